"""The benchmark: tuswsgi and its peers under the same load, on one machine.

``python -m tests.bench`` in a checkout that is installed with the extra ``bench``; Linux only.
Peers need npm or pip's package index once. It takes half an hour; ``--quick`` takes minutes and
only shows that it works. Nothing else should run meanwhile: only ratios within one run count,
and CPU per GiB or per request is steadier than what the clock says.

All servers have their default settings, also for the log. With ``--dir`` on a tmpfs and ``--disk``
on a disk, downloads are measured from both.
"""
