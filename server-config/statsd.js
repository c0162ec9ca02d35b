// statsd's settings: a graph that moves within a second of the event it counts.
{
  graphiteHost: "127.0.0.1",
  graphitePort: 2003,
  port: 8125,
  servers: [{ server: "./servers/udp", address: "0.0.0.0", port: 8125 }],

  // The finest retention of storage-schemas.conf: a shorter interval would overwrite points, a longer one leave gaps.
  flushInterval: 1000,

  // An idle counter is sent as 0. An idle timer is not sent: 0 would lower its mean.
  deleteCounters: false,
  deleteTimers: true,

  // A gauge that is no longer sent ends after this many flushes, so that it does not look current. Gauges are sent more
  // often than that.
  deleteGauges: true,
  gaugesMaxTTL: 15,

  // Counters appear as stats_counts.<name> (events per flush) and stats.<name> (events per second).
  graphite: { legacyNamespace: true },
  percentThreshold: [90, 99]
}
