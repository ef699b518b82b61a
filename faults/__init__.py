"""The fault campaign: what happens to the library under kills, bad inputs, full disks and other habits of the world.

`python -m faults` runs every part and writes one record a part; `python -m faults.page` renews docs/reliability.md.
"""
