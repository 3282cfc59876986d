"""An application of its own with uploads in it, as small as it gets."""

import os

from flask import Flask

from tuswsgi import Tus

app = Flask(__name__)
tus = Tus(data_dir=os.environ["DATA_DIR"], network_timeout="20s")
app.register_blueprint(tus.blueprint(), url_prefix="/files")


@app.get("/")
def index() -> str:
    return "my own page"


@app.post("/stop/<id>")
def stop(id: str) -> str:
    return str(tus.stop(id))
