"""The publishers that are measured, each a process of its own, and how they run in one.

All send the same bodies, persistent, to the exchange `events`, to which one quorum queue is bound.
"""
