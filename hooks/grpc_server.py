#!/usr/bin/env python3
"""A gRPC service for hooks: run `./grpc_server.py 8081`, with grpcio-tools installed.

The messages are tusd's, so handlers that were written for tusd work unchanged.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import grpc

# hook.proto is in the package; other applications compile a copy of it.
sys.path.append(str(files("tuswsgi.hooks").joinpath("proto")))
messages, services = grpc.protos_and_services("hook.proto")


class Handler(services.HookHandlerServicer):  # type: ignore[name-defined, misc]
    def InvokeHook(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        upload = request.event.upload
        if request.type == "pre-create" and "filename" not in upload.metaData:
            response = messages.HTTPResponse(statusCode=400, body="Please name your file.\n")
            return messages.HookResponse(rejectUpload=True, httpResponse=response)
        print(request.type, upload.id, upload.offset, flush=True)
        return messages.HookResponse()


def main(port: int) -> None:
    server = grpc.server(ThreadPoolExecutor(max_workers=10))
    services.add_HookHandlerServicer_to_server(Handler(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    print(f"Listening on port {bound}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 8081)
