"""What is read from etcd's metrics page."""

from .gauges import gauges_of

PAGE = """
# HELP etcd_mvcc_put_total Total number of puts seen by this member.
# TYPE etcd_mvcc_put_total counter
etcd_mvcc_put_total 300002
etcd_mvcc_put_total_of_another 7
etcd_debugging_lease_granted_total 30
etcd_debugging_lease_revoked_total 4
process_resident_memory_bytes 3.60534016e+08
grpc_server_started_total{grpc_method="Txn",grpc_service="etcdserverpb.KV",grpc_type="unary"} 12
grpc_server_started_total{grpc_method="TxnOfAnother",grpc_service="x",grpc_type="unary"} 5
"""


def test_each_is_read_by_its_whole_name() -> None:
    found = gauges_of(PAGE)
    assert found.written == 300_002
    assert found.memory == 360_534_016
    assert found.leases == 26
    assert found.transactions == 12


def test_what_is_absent_is_zero() -> None:
    assert gauges_of("").written == 0
