//! What the levels of the cache count and time. Handles are looked up once a level: recording is an atomic or two.

use ::metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

/// Registers help and unit of every metric of the cache. Call it once, after the recorder is installed.
pub fn describe() {
    describe_counter!("eremois_cache_hits_total", Unit::Count, "Results found, by level");
    describe_counter!("eremois_cache_misses_total", Unit::Count, "Results looked for in vain, by level");
    describe_counter!("eremois_cache_errors_total", Unit::Count, "Calls that failed and values that do not parse");
    describe_counter!("eremois_cache_timeouts_total", Unit::Count, "Calls that took longer than cache.timeout");
    describe_counter!("eremois_cache_dropped_writes_total", Unit::Count, "Results not written: full, slow or away");
    describe_gauge!("eremois_cache_up", Unit::Count, "1 while the level is asked, 0 while it is passed over");
    describe_gauge!("eremois_cache_entries", Unit::Count, "Results held");
    describe_gauge!("eremois_cache_bytes", Unit::Bytes, "Bytes held, with what they cost beside the values");
    describe_histogram!("eremois_cache_get_seconds", Unit::Seconds, "One look-up of all keys of a request, in time");
}

/// The handles of the level in this process.
pub struct LocalMetrics {
    pub hits: Counter,
    pub misses: Counter,
    pub entries: Gauge,
    pub bytes: Gauge,
}

impl Default for LocalMetrics {
    fn default() -> Self {
        Self {
            hits: counter!("eremois_cache_hits_total", "level" => "memory"),
            misses: counter!("eremois_cache_misses_total", "level" => "memory"),
            entries: gauge!("eremois_cache_entries", "level" => "memory"),
            bytes: gauge!("eremois_cache_bytes", "level" => "memory"),
        }
    }
}

/// The handles of Redis.
pub struct RedisMetrics {
    pub hits: Counter,
    pub misses: Counter,
    pub errors: Counter,
    pub timeouts: Counter,
    pub dropped_writes: Counter,
    pub up: Gauge,
    pub get: Histogram,
}

impl Default for RedisMetrics {
    fn default() -> Self {
        Self {
            hits: counter!("eremois_cache_hits_total", "level" => "redis"),
            misses: counter!("eremois_cache_misses_total", "level" => "redis"),
            errors: counter!("eremois_cache_errors_total", "level" => "redis"),
            timeouts: counter!("eremois_cache_timeouts_total", "level" => "redis"),
            dropped_writes: counter!("eremois_cache_dropped_writes_total", "level" => "redis"),
            up: gauge!("eremois_cache_up", "level" => "redis"),
            get: histogram!("eremois_cache_get_seconds", "level" => "redis"),
        }
    }
}
