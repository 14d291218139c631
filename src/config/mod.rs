//! Settings: raw as typed, then checked once, all faults reported together.
//!
//! One table, [`keys::KEYS`], says what every key is called, where its value lives, what it means and
//! whether it can change while the server runs. Reading, `eremois config show`, `eremois config check`,
//! the reference in `docs/config.md` and reloading all walk that table: there is no second list.
//!
//! A value comes from the last of: the default, the file, the environment, `--set`.

pub mod keys;
pub mod read;
pub mod reload;
pub mod show;
mod table;
pub mod values;
pub mod words;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::jobs::callback::sign::Secret;
use crate::model::image::{ImageLimits, MAX_FILE_BYTES, MAX_PIXELS};
use crate::ops::device::DeviceSpec;
use crate::serve::policy::BatchLimits;
pub use read::{Loaded, Origin, Sources};
use values::{ByteSize, Count};
use words::{
    ApiVersion, CacheUrl, ControlMode, DatabaseUrl, HttpUrl, LogFilter, LogFormat, Networks, RecordScope, StoreInput,
};

/// Every setting, checked. `docs/config.md` describes each one.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub api: Api,
    pub database: Database,
    pub cache: Cache,
    pub jobs: Jobs,
    pub ai: Ai,
    pub log: Log,
}

/// `[api]`: what clients reach and how much they may ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct Api {
    pub listen: SocketAddr,
    pub grpc_listen: Option<SocketAddr>,
    pub url: Option<HttpUrl>,
    pub version: ApiVersion,
    pub timeout: Duration,
    pub max_body_bytes: ByteSize,
    pub compress_above: ByteSize,
    pub max_client_batch_size: usize,
    pub drain_timeout: Duration,
}

/// `[database]`: where inferences, jobs and keys are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Database {
    pub url: DatabaseUrl,
    pub path: PathBuf,
    pub pool_size: usize,
    pub replica_set: Option<String>,
    pub record: RecordScope,
    pub store_input: StoreInput,
    /// Zero: kept for good.
    pub retention: Duration,
    pub journal_max_bytes: ByteSize,
}

/// `[cache]`: where results already computed are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Cache {
    pub url: CacheUrl,
    pub ttl: Duration,
    pub max_bytes: ByteSize,
    /// Newest records that a server fills it from at its start.
    pub warm: Count,
    /// What Redis may take before it counts as a miss.
    pub timeout: Duration,
}

/// `[jobs]`: what is accepted now and done later.
#[derive(Debug, Clone, PartialEq)]
pub struct Jobs {
    /// Tasks that this server runs at once.
    pub max_concurrency: usize,
    /// How long a server that gives no sign of life keeps a task.
    pub lease: Duration,
    /// Largest file that a client may upload.
    pub max_file_bytes: ByteSize,
    /// Most requests of a batch.
    pub max_batch_requests: usize,
    /// How long files and batches are kept. Zero: for good.
    pub retention: Duration,
    /// What callbacks are signed with; `None`: there are none.
    pub callback_secret: Option<Secret>,
    /// Networks that are not public and that callbacks may reach.
    pub callback_networks: Networks,
}

/// `[ai]`: what is served, on what, in what batches.
#[derive(Debug, Clone, PartialEq)]
pub struct Ai {
    /// Empty: all of the repository.
    pub models: Vec<String>,
    /// `None`: where [`crate::model::repository::Repository::locate`] finds it.
    pub models_dir: Option<PathBuf>,
    /// `None`: see [`Ai::cache_dir`].
    pub cache_dir: Option<PathBuf>,
    pub default_model: Option<String>,
    pub model_control: ControlMode,
    pub device: DeviceSpec,
    pub model_endpoint: Option<HttpUrl>,
    pub max_batch_size: usize,
    pub max_batch_tokens: usize,
    pub max_queue_delay: Duration,
    pub max_queue_size: usize,
    pub max_image_pixels: usize,
    pub max_image_bytes: ByteSize,
    pub heartbeat_interval: Duration,
    pub device_timeout: Duration,
}

impl Ai {
    /// The folder for what can be measured again: the setting, else `eremois` in the user's cache, if the system names
    /// one.
    pub fn cache_dir(&self) -> Option<PathBuf> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let user = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        self.cache_dir.clone().or_else(|| user().map(|cache| cache.join("eremois")))
    }

    /// What is decoded of clients' images.
    pub fn image_limits(&self) -> ImageLimits {
        ImageLimits { max_pixels: self.max_image_pixels, max_bytes: self.max_image_bytes.0 }
    }

    /// The batching limits of models whose manifest says nothing else.
    pub fn limits(&self) -> BatchLimits {
        BatchLimits {
            max_batch_size: self.max_batch_size,
            max_batch_tokens: self.max_batch_tokens,
            max_queue_delay: self.max_queue_delay,
            max_queue_size: self.max_queue_size,
        }
    }
}

/// `[log]`: what is written to standard error.
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    pub format: LogFormat,
    pub filter: LogFilter,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            api: Api {
                // Loopback: a server without keys is not offered to a network unless told to.
                listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
                grpc_listen: None,
                url: None,
                version: ApiVersion::V1,
                timeout: Duration::from_secs(30),
                // Both hold the largest request an OpenAI client may send: 2,048 inputs.
                max_body_bytes: ByteSize(8 << 20),
                // Above one embedding, whose client waits for it alone.
                compress_above: ByteSize(16 << 10),
                max_client_batch_size: 2048,
                // Under the 30 s an orchestrator commonly waits before it kills.
                drain_timeout: Duration::from_secs(25),
            },
            database: Database {
                url: DatabaseUrl::Embedded,
                path: PathBuf::from("data"),
                pool_size: 16,
                replica_set: None,
                record: RecordScope::Application,
                store_input: StoreInput::Full,
                retention: Duration::ZERO,
                // Some 500,000 embeddings of 384 values: an hour or so of MongoDB being away.
                journal_max_bytes: ByteSize(1 << 30),
            },
            cache: Cache {
                url: CacheUrl::Memory,
                ttl: Duration::from_secs(3600),
                max_bytes: ByteSize(256 << 20),
                warm: Count(0),
                // A healthy Redis answers in well under a millisecond; computing again takes a few.
                timeout: Duration::from_millis(20),
            },
            jobs: Jobs {
                max_concurrency: 16,
                lease: Duration::from_secs(30),
                // The three are those of OpenAI's API.
                max_file_bytes: ByteSize(200 << 20),
                max_batch_requests: 50_000,
                retention: Duration::from_secs(30 * 24 * 3600),
                callback_secret: None,
                callback_networks: Networks::default(),
            },
            ai: Ai {
                models: Vec::new(),
                models_dir: None,
                cache_dir: None,
                default_model: None,
                model_control: ControlMode::Settings,
                device: DeviceSpec::Auto,
                model_endpoint: None,
                max_batch_size: 32,
                // About half a second of two CPU cores with a model of MiniLM's size: warm-up at the
                // limits stays short, and a longer batch would win no throughput there.
                max_batch_tokens: 4096,
                max_queue_delay: Duration::ZERO,
                max_queue_size: 4096,
                max_image_pixels: MAX_PIXELS,
                max_image_bytes: ByteSize(MAX_FILE_BYTES),
                heartbeat_interval: Duration::from_secs(5),
                device_timeout: Duration::from_secs(30),
            },
            log: Log { format: LogFormat::Human, filter: LogFilter("info".to_string()) },
        }
    }
}

/// Where models are pulled from, and who asks.
///
/// Not in the table: `HF_ENDPOINT` and `HF_TOKEN` are the names every hub tool reads.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Hub {
    /// `ai.model_endpoint`, else `HF_ENDPOINT`, else `None` for the hub's own address.
    pub endpoint: Option<String>,
    /// `HF_TOKEN`, for gated and private models. Never shown.
    pub token: Option<String>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "***");
        f.debug_struct("Hub").field("endpoint", &self.endpoint).field("token", &token).finish()
    }
}
