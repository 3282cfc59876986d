#!/usr/bin/env python3
"""An HTTP endpoint for hooks that authenticates the server and its clients.

Run it as `HOOKS_SECRET=... TOKEN=... ./http_receiver.py 8080`, with Flask installed.
"""

import hashlib
import hmac
import os
import sys
import time

from flask import Flask, Response, abort, jsonify, request

SECRET = os.environ["HOOKS_SECRET"].encode()
TOKEN = os.environ["TOKEN"]

app = Flask(__name__)

#: The ids of handled events. A real application stores them in its database, in the same
#: transaction as its other changes.
seen: set[str] = set()


@app.before_request
def check_signature() -> None:
    """Refuse requests that are not signed with our secret, or were signed long ago."""
    fields = request.headers.get("Webhook-Signature", "").split(",")
    signature = dict(field.partition("=")[::2] for field in fields)
    signed_at, given = signature.get("t", ""), signature.get("v1", "")
    signed = signed_at.encode() + b"." + request.get_data()
    expected = hmac.new(SECRET, signed, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(given.encode(), expected.encode()):
        abort(403)
    if abs(time.time() - int(signed_at)) > 300:
        abort(403)


@app.post("/hooks")
def hook() -> Response:
    name, upload = request.headers["Hook-Name"], request.get_json()["upload"]
    if name.startswith("pre-"):
        # The client's header, which the server forwards. Check it in pre-hooks only: a post-hook
        # may arrive hours later, when the token has expired.
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {TOKEN}".encode()):
            abort(401)
        return jsonify({})
    if request.headers["Hook-Id"] not in seen:
        print(name, upload["id"], upload["metadata"].get("filename"), flush=True)
        seen.add(request.headers["Hook-Id"])
    return jsonify({})


if __name__ == "__main__":
    app.run(port=int(sys.argv[1]) if sys.argv[1:] else 8080)
