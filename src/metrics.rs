//! The recorder and the names every module shares; each module registers what it owns.
//!
//! Names end in their unit: `_seconds`, `_bytes`, `_total`, and for histograms of counts `_size` or
//! `_tokens`; the ending chooses a histogram's buckets. Labels are models, versions and enums only, so
//! that their number stays bounded. `docs/metrics.md` lists them all.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::metrics::{Unit, describe_gauge, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// What was built: version, commit and features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Build {
    pub version: &'static str,
    /// Abbreviated hash, "-dirty" with changes; "unknown" outside git, "debug" in builds for debugging.
    pub commit: &'static str,
    /// Separated by commas; "none" where none is on.
    pub features: &'static str,
}

/// This build.
pub const BUILD: Build = Build {
    version: env!("CARGO_PKG_VERSION"),
    commit: env!("BUILD_COMMIT"),
    features: if cfg!(feature = "cuda") { "cuda" } else { "none" },
};

/// How often [`Metrics::upkeep`] wants to be called: often enough that samples of histograms that nobody
/// scrapes do not pile up.
pub const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// The recorder's handle: renders what was recorded.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

/// Bounds of time histograms: five a decade from 50 microseconds to 10 seconds, so that the error of an
/// interpolated quantile stays below a third.
pub const SECONDS_BUCKETS: &[f64] = &[
    50e-6, 80e-6, 125e-6, 200e-6, 315e-6, 500e-6, 800e-6, 1.25e-3, 2e-3, 3.15e-3, 5e-3, 8e-3, 12.5e-3, 20e-3, 31.5e-3,
    50e-3, 80e-3, 0.125, 0.2, 0.315, 0.5, 0.8, 1.25, 2.0, 3.15, 5.0, 8.0, 10.0,
];

/// Bounds of histograms of sequences in a batch: powers of two.
pub const SIZE_BUCKETS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// Bounds of histograms of tokens: powers of two.
pub const TOKENS_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0, 131072.0, 262144.0,
];

/// Bounds of histograms of shares between 0 and 1.
pub const RATIO_BUCKETS: &[f64] = &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// Installs the recorder of this process. Errors: another recorder is installed already.
pub fn install() -> Result<Metrics, String> {
    let rows = [
        ("_seconds", SECONDS_BUCKETS),
        ("_size", SIZE_BUCKETS),
        ("_tokens", TOKENS_BUCKETS),
        ("_ratio", RATIO_BUCKETS),
    ];
    let mut builder = PrometheusBuilder::new();
    for (ending, buckets) in rows {
        let matcher = Matcher::Suffix(ending.to_string());
        builder = builder.set_buckets_for_metric(matcher, buckets).map_err(|e| e.to_string())?;
    }
    // Not the builder's own way of installing: that one may start a thread for upkeep, which is our task's work.
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    ::metrics::set_global_recorder(recorder).map_err(|e| e.to_string())?;
    describe();
    Ok(Metrics { handle })
}

impl Metrics {
    /// The Prometheus text of everything recorded, process metrics read afresh.
    ///
    /// Blocks: about a millisecond; call it off the async threads.
    pub fn render(&self) -> String {
        let process = Process::read();
        process.record();
        let mut text = self.handle.render();
        if let Some(cpu) = process.cpu {
            // Written here, because counters of the recorder hold whole numbers only.
            text.push_str("# HELP process_cpu_seconds_total User and system CPU time spent\n");
            text.push_str("# TYPE process_cpu_seconds_total counter\n");
            text.push_str(&format!("process_cpu_seconds_total {}\n", cpu.as_secs_f64()));
        }
        text
    }

    /// Folds recorded samples into their histograms.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

fn describe() {
    describe_gauge!("eremois_build_info", "Always 1; the labels say what was built");
    gauge!("eremois_build_info", "version" => BUILD.version, "commit" => BUILD.commit, "features" => BUILD.features)
        .set(1.0);
    // The names Prometheus client libraries share, without our prefix: dashboards know them.
    describe_gauge!("process_resident_memory_bytes", Unit::Bytes, "Resident memory");
    describe_gauge!("process_open_fds", Unit::Count, "Open file descriptors");
    describe_gauge!("process_max_fds", Unit::Count, "Most file descriptors the process may open");
    describe_gauge!("process_threads", Unit::Count, "Threads of the process");
    describe_gauge!("process_start_time_seconds", Unit::Seconds, "Start of the process in Unix time");
}

/// What the kernel says of this process. Each value is `None` where it cannot be read.
#[derive(Debug, Default, PartialEq)]
struct Process {
    cpu: Option<Duration>,
    start: Option<Duration>,
    resident_bytes: Option<u64>,
    threads: Option<u64>,
    open_fds: Option<u64>,
    max_fds: Option<u64>,
}

/// Clock ticks a second in `/proc/<pid>/stat`: 100 on every Linux of x86 and ARM, whatever the kernel's
/// own clock. Asking for it would need a foreign function.
const TICKS_PER_SECOND: u64 = 100;

impl Process {
    fn read() -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let mut process = Self::parse(&text("/proc/self/stat"), &text("/proc/self/status"), &text("/proc/self/limits"));
        process.open_fds = std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64);
        process
    }

    /// Source: proc(5), "stat", "status" and "limits".
    fn parse(stat: &str, status: &str, limits: &str) -> Self {
        // The second field is the command in brackets and may hold spaces and brackets itself.
        let fields: Vec<&str> =
            stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        // proc(5) counts from 1 and the first field left here is its third.
        let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let time = |ticks: u64| Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND);
        let of_status = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let of_limits = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        Self {
            cpu: ticks(14).zip(ticks(15)).map(|(user, system)| time(user + system)),
            start: ticks(22).map(time),
            resident_bytes: of_status("VmRSS:").map(|kib| kib * 1024),
            threads: of_status("Threads:"),
            open_fds: None,
            max_fds: of_limits.and_then(|rest| rest.split_whitespace().next()?.parse().ok()),
        }
    }

    fn record(&self) {
        let gauges = [
            ("process_resident_memory_bytes", self.resident_bytes),
            ("process_threads", self.threads),
            ("process_open_fds", self.open_fds),
            ("process_max_fds", self.max_fds),
        ];
        for (name, value) in gauges {
            if let Some(value) = value {
                gauge!(name).set(value as f64);
            }
        }
        if let Some(start) = self.start.and_then(unix_time) {
            gauge!("process_start_time_seconds").set(start.as_secs_f64());
        }
    }
}

/// A time since boot as Unix time.
fn unix_time(since_boot: Duration) -> Option<Duration> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    (now + since_boot).checked_sub(Duration::try_from_secs_f64(uptime).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stat_of_a_command_with_brackets_and_spaces() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 12345 1000 10 18446744073709551615";
        let status = "Name:\ta\nVmRSS:\t    2048 kB\nThreads:\t4\n";
        let limits =
            "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 4096  files\n";
        let process = Process::parse(stat, status, limits);
        assert_eq!(process.cpu, Some(Duration::from_secs(3)));
        assert_eq!(process.start, Some(Duration::from_millis(123_450)));
        assert_eq!(process.resident_bytes, Some(2 << 20));
        assert_eq!(process.threads, Some(4));
        assert_eq!(process.max_fds, Some(1024));
    }

    #[test]
    fn unreadable_files_give_no_values() {
        assert_eq!(Process::parse("", "", ""), Process::default());
        assert_eq!(Process::parse("7 (a", "VmRSS:\n", "Max open files\n"), Process::default());
    }

    #[test]
    fn this_process_has_every_value() {
        let process = Process::read();
        assert!(process.resident_bytes.is_some_and(|bytes| bytes > 1 << 20), "{process:?}");
        assert!(process.open_fds.is_some_and(|fds| fds >= 3), "{process:?}");
        assert!(process.cpu.is_some() && process.threads.is_some(), "{process:?}");
        let start = process.start.and_then(unix_time).expect("/proc/uptime is readable");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        assert!(start <= now + Duration::from_secs(1) && start + Duration::from_secs(600) > now, "{start:?} {now:?}");
    }

    #[test]
    fn buckets_rise_and_reach_their_ends() {
        for buckets in [SECONDS_BUCKETS, SIZE_BUCKETS, TOKENS_BUCKETS, RATIO_BUCKETS] {
            assert!(buckets.windows(2).all(|w| w[0] < w[1]), "{buckets:?}");
        }
        assert_eq!((SECONDS_BUCKETS[0], SECONDS_BUCKETS[SECONDS_BUCKETS.len() - 1]), (50e-6, 10.0));
        assert!(SECONDS_BUCKETS.windows(2).all(|w| w[1] / w[0] < 1.7), "a gap is too wide to resolve a quantile");
    }

    #[test]
    fn histograms_have_buckets_and_the_build_is_named() {
        let metrics = install().expect("the only test that installs a recorder");
        ::metrics::histogram!("eremois_probe_seconds").record(0.0006);
        ::metrics::histogram!("eremois_probe_batch_size").record(3.0);
        metrics.upkeep();
        let text = metrics.render();
        assert!(text.contains("eremois_probe_seconds_bucket{le=\"0.0008\"} 1"), "{text}");
        assert!(text.contains("eremois_probe_seconds_bucket{le=\"0.0005\"} 0"), "{text}");
        assert!(text.contains("eremois_probe_batch_size_bucket{le=\"4\"} 1"), "{text}");
        assert!(text.contains(&format!("eremois_build_info{{version=\"{}\"", BUILD.version)), "{text}");
        assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
        assert!(text.contains("\nprocess_cpu_seconds_total "), "{text}");
    }
}
