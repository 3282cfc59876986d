"""gunicorn's settings: ``gunicorn -c conf/gunicorn.conf.py wsgi:application``.

They come from the same options as those of ``tuswsgi serve``, which are read from the
environment and from the INI file that ``TUSWSGI_CONFIG`` names. Flags of gunicorn win.
"""

import os
import sys

from tuswsgi.config import Config
from tuswsgi.errors import ConfigurationError
from tuswsgi.server import gunicorn_settings

try:
    globals().update(gunicorn_settings(Config.from_environment(os.environ)))
except ConfigurationError as error:
    sys.exit(str(error))
