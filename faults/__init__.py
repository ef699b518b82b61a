"""The fault campaign: kills, bad inputs, full disks and other faults of the environment, tried on the library.

`python -m faults` runs every part and writes one record a part; `python -m faults.page` renews docs/reliability.md.
"""
