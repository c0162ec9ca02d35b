"""Until its last user imports from where it is."""

from servers.etcd import Record, Store, record_prefix

__all__ = ["Record", "Store", "record_prefix"]
