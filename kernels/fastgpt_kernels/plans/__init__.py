"""What was measured on the device at hand, and kept: the fastest of what is right.

store.py    one JSON file a question, in the user's cache folder
device.py   what a measurement is valid for: GPU, driver, versions, the kernels' sources
choose.py   candidates are checked, timed in turns, and the default is left for a proven gain
child.py    a process in which a candidate may fail, hang or crash
measure.py  what is called there: an op, forward and backward, as a run uses it
tune.py     the candidates of an op, from its record
sm_*.json   plans that ship with the package
"""
