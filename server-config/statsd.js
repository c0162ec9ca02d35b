// statsd's settings: a graph that moves within a second of the event it counts.
{
  graphiteHost: "127.0.0.1",
  graphitePort: 2003,
  port: 8125,
  servers: [{ server: "./servers/udp", address: "0.0.0.0", port: 8125 }],

  // As long as the finest retention in storage-schemas.conf: shorter would overwrite points, longer would leave gaps.
  flushInterval: 1000,

  // An idle counter is a count of 0. An idle timer has no duration at all, and 0 would pull its mean down.
  deleteCounters: false,
  deleteTimers: true,

  // Nor may a gauge that nobody sends any more look as if it still held: its line ends after so many flushes. Whoever
  // sends gauges sends them more often than that.
  deleteGauges: true,
  gaugesMaxTTL: 15,

  // Counters appear as stats_counts.<name> (events per flush) and stats.<name> (events per second).
  graphite: { legacyNamespace: true },
  percentThreshold: [90, 99]
}
