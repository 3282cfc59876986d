"""gunicorn's settings: ``gunicorn -c conf/gunicorn.conf.py wsgi:application``.

They come from the same options as those of ``tuswsgi serve``, which are read from the
environment and from the INI file that ``TUSWSGI_CONFIG`` names. Flags of gunicorn win.
"""

# gunicorn's workers patch, too, but only after the imports below.
from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import sys  # noqa: E402

from tuswsgi.config.loading import Config  # noqa: E402
from tuswsgi.core.errors import ConfigurationError  # noqa: E402
from tuswsgi.serving.settings import gunicorn_settings  # noqa: E402

try:
    globals().update(gunicorn_settings(Config.from_environment(os.environ)))
except ConfigurationError as error:
    sys.exit(str(error))
