"""Bitmaps: one bit for each cluster or granule of a device.

`clusters` is for copies under way. `dirty` is what clients changed; `node_bitmaps` has those of one node by
name, `checkpoints` in the order of time. A dirty bitmap that outlives its server is `stored`: `file` and
`file_format` are its file, `durable_marks` what makes it outlive a loss of power, `identity` the source that
it is true of, and `store` the directory of all of them.
"""
