"""Each published formula once more, in plain loops over one pair of raw tensors; nothing here imports ctlens.

States are lists by layer. Windows come as the published codes pass them: a start on either side and a
length, or the length of the common suffix.
"""
