"""An application of its own with uploads in it, as small as it gets."""

import os
from pathlib import Path

from flask import Flask

from tuswsgi import HookRequest, Tus

app = Flask(__name__)
data_dir = Path(os.environ["DATA_DIR"])
tus = Tus(data_dir=data_dir, network_timeout="20s")
app.register_blueprint(tus.blueprint(), url_prefix="/files")


@tus.on("pre-create")
def log_client(hook: HookRequest) -> None:
    with data_dir.with_name("clients").open("a") as log:
        log.write(f"{hook.request.remote_addr} {hook.request.remote_port}\n")


@app.get("/")
def index() -> str:
    return "my own page"


@app.post("/stop/<id>")
def stop(id: str) -> str:
    return str(tus.stop(id))
