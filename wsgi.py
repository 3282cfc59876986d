"""The application for any WSGI server: ``gunicorn -c conf/gunicorn.conf.py wsgi:application``.

It is configured by the environment and by the INI file that ``TUSWSGI_CONFIG`` names.
"""

import os

from tuswsgi.config.loading import Config
from tuswsgi.serving import dispatch

application = dispatch.application(Config.from_environment(os.environ))
