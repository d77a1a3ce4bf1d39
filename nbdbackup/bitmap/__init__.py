"""Bitmaps: one bit for each cluster or granule of a device.

`clusters` is for copies under way. `dirty` is what clients changed, by name in `node_bitmaps`, in order of time in
`checkpoints`. A dirty bitmap that outlives its server is a `stored` one: `file` and `file_format` are its file,
`durable_marks` what makes it outlive a loss of power, `identity` the source it is true of, and `store` the directory.
"""
