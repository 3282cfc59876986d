"""tuspyserver in a FastAPI app, as in its README; run by uvicorn in its own environment."""

import os

from fastapi import FastAPI
from tuspyserver import create_tus_router

app = FastAPI()
app.include_router(create_tus_router(files_dir=os.environ["BENCH_DIRECTORY"]))
