"""The eight stages: each reads its inputs, maps units over an engine, and publishes. They import the library, no driver."""
