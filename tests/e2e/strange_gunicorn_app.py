"""Our application under a gunicorn whose internals are not those that we know."""

import os

import gunicorn.http.unreader
import gunicorn.http.wsgi

from tuswsgi.config.loading import Config
from tuswsgi.serving import dispatch

application = dispatch.application(Config.from_environment(os.environ))


class Response(gunicorn.http.wsgi.Response):
    """Another one, in another place."""


gunicorn.http.wsgi.Response = Response
del gunicorn.http.unreader.Unreader.take_buffered
