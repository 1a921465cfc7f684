"""What carries a stage and cannot change a number: parameters, errors, registries of methods, and restartable units.

A stage is a `Scratch` over `Unit`s, given to an `Engine`; files are made durable and named by digests (`disk`, `files`, `pointers`,
`objects`), arrays lie in a `store` of one zip a group, tables in Parquet. Imports no other room. Our own zip reader (`object_group`)
stays, for it checks every range against its length and CRC-32C, which fsspec's does not. Locks are filelock's, with what it lacks (`locks`); tries
are tenacity's, but for its jitter, which would draw from the global generator (`objects`).
"""
