"""``python -m tuswsgi`` is the command ``tuswsgi``."""

from tuswsgi.commands.cli import main

main(prog_name="tuswsgi")
