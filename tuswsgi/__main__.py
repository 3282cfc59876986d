"""``python -m tuswsgi`` is the command ``tuswsgi``."""

from tuswsgi.cli import main

main(prog_name="tuswsgi")
