"""The application for any WSGI server: ``gunicorn -c conf/gunicorn.conf.py wsgi:application``.

It is configured by the environment and by the INI file that ``TUSWSGI_CONFIG`` names.
"""

import os

from tuswsgi.app import create_app
from tuswsgi.config.loading import Config

application = create_app(Config.from_environment(os.environ))
