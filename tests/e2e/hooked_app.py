"""An application whose pre-finish hook does what a file beside its uploads says."""

import os
import signal
from pathlib import Path

from flask import Flask

from tuswsgi import Tus
from tuswsgi.hooks.base import HookRequest, HookResponse

app = Flask(__name__)
data_dir = Path(os.environ["DATA_DIR"])
tus = Tus(data_dir=data_dir)
app.register_blueprint(tus.blueprint(), url_prefix="/files")


@tus.on("pre-finish")
def finish(request: HookRequest) -> "HookResponse | None":
    with data_dir.with_name("calls").open("a") as calls:
        calls.write(f"{request.info.id} {request.info.offset}\n")
    match data_dir.with_name("behaviour").read_text():
        case "fail":
            raise RuntimeError("the hook is broken")
        case "die" if request.request.method == "PATCH":
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuse":
            return HookResponse(
                reject=True, status=422, body="No cats, please.", headers={"X-Reason": "cats"}
            )
        case "answer":
            return HookResponse(status=200, body="Thank you.", headers={"X-Ticket": "7"})
    return None
