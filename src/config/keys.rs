//! The table of keys: the only list there is.

use super::Settings;
use super::values::Field;

/// When a changed value takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// At once, by SIGHUP or by writing the file.
    Live,
    /// At the next start.
    Restart,
    /// Checked now, used by a part that is not in this version.
    Later,
}

/// One key of one section.
pub struct Key {
    pub section: &'static str,
    pub name: &'static str,
    /// Another accepted name.
    pub alias: Option<&'static str>,
    pub effect: Effect,
    /// Where the value lives in [`Settings`]. Takes `&mut` for reading too: one accessor serves both.
    pub field: fn(&mut Settings) -> &mut dyn Field,
    /// What it means: full sentences, for `config show` and `docs/config.md`.
    pub doc: &'static str,
}

impl Key {
    /// `api.listen`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// `EREMOIS_API__LISTEN`.
    pub fn variable(&self) -> String {
        variable(self.section, self.name)
    }

    /// Whether `name` is this key's name or alias.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.alias == Some(name)
    }
}

/// The environment variable of a section's key.
pub fn variable(section: &str, name: &str) -> String {
    format!("EREMOIS_{}__{}", section.to_uppercase(), name.to_uppercase())
}

/// The sections in the order they are shown, with what each is about.
pub const SECTIONS: &[(&str, &str)] = &[
    ("api", "What clients reach, and how much they may ask for."),
    ("database", "Where inferences and jobs are kept, which of them, and how long."),
    ("cache", "Where results already computed are found again."),
    ("jobs", "What is accepted now and done later: asynchronous inferences, batches, callbacks."),
    (
        "ai",
        "What is served, on what device, in what batches. A model's manifest.toml may override the batching limits.",
    ),
    ("log", "What is written to standard error."),
];

/// Every key, grouped by section in the order of [`SECTIONS`].
pub const KEYS: &[Key] = &[
    Key {
        section: "api",
        name: "listen",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.api.listen,
        doc: "Address and port of HTTP. Port 0 takes a free one. 0.0.0.0 or [::] opens the server to the network.",
    },
    Key {
        section: "api",
        name: "grpc_listen",
        alias: None,
        effect: Effect::Later,
        field: |s| &mut s.api.grpc_listen,
        doc: "Address and port of gRPC. Empty: no gRPC.",
    },
    Key {
        section: "api",
        name: "url",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.api.url,
        doc: "The address clients use, where it is not the listening one (behind a proxy). Written into the OpenAPI document. Empty: http:// and the listening address.",
    },
    Key {
        section: "api",
        name: "version",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.api.version,
        doc: "Version of the application API, served under /api/<version>.",
    },
    Key {
        section: "api",
        name: "timeout",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.api.timeout,
        doc: "How long a request may take before it is answered 504 and its entries leave the queue. A client may ask for less with the header x-request-timeout, never for more.",
    },
    Key {
        section: "api",
        name: "max_body_bytes",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.api.max_body_bytes,
        doc: "Largest request body. A larger one is answered 413.",
    },
    Key {
        section: "api",
        name: "max_client_batch_size",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.api.max_client_batch_size,
        doc: "Most inputs in one request. More are answered 413. At most ai.max_queue_size, since the inputs of a request are queued together or not at all.",
    },
    Key {
        section: "api",
        name: "drain_timeout",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.api.drain_timeout,
        doc: "After SIGTERM or SIGINT, how long accepted requests may take to finish before the server exits regardless. Keep it below the time your orchestrator waits before it kills.",
    },
    Key {
        section: "database",
        name: "url",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.url,
        doc: "`embedded` for the built-in store, or a MongoDB connection string.",
    },
    Key {
        section: "database",
        name: "path",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.path,
        doc: "Data directory of the embedded store.",
    },
    Key {
        section: "database",
        name: "pool_size",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.pool_size,
        doc: "Most connections to MongoDB.",
    },
    Key {
        section: "database",
        name: "replica_set",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.replica_set,
        doc: "Name of MongoDB's replica set. Empty: what the connection string says. Only with a MongoDB url.",
    },
    Key {
        section: "database",
        name: "record",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.record,
        doc: "Whose requests are kept: `application`: those of /api that do not say `store: false`; `all`: also those of the compatible protocols; `none`: nobody's, and /api takes no `store: true`.",
    },
    Key {
        section: "database",
        name: "store_input",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.store_input,
        doc: "What is kept of an input: `full`, `hash` (a BLAKE3 of it, so that equal ones can be told) or `none`.",
    },
    Key {
        section: "database",
        name: "retention",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.retention,
        doc: "How long a record is kept after it was made. 0s: for good.",
    },
    Key {
        section: "database",
        name: "journal_max_bytes",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.database.journal_max_bytes,
        doc: "Most bytes of the journal that takes results while MongoDB is away. When it is full, requests to be stored are answered 503.",
    },
    Key {
        section: "cache",
        name: "url",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.cache.url,
        doc: "`memory` for a cache in this process alone, or a Redis behind it that processes share: redis://[user:password@]host[:port][/db], redis+sentinel://[user:password@]host[:port],host…/master-name[/db], redis+cluster://[user:password@]host[:port],host…; rediss in place of redis for TLS. docs/cache.md says more.",
    },
    Key {
        section: "cache",
        name: "ttl",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.cache.ttl,
        doc: "How long a result is kept. 0s: no cache; every input is computed, equal ones in flight too.",
    },
    Key {
        section: "cache",
        name: "max_bytes",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.cache.max_bytes,
        doc: "Most memory of the level in this process. What is asked for often stays.",
    },
    Key {
        section: "cache",
        name: "warm",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.cache.warm,
        doc: "How many of the newest records the cache is filled from in the background when the server has loaded its models. 0: none. Used are records with their whole input that the models as they are served now have computed; `eremois cache warm` does the same for Redis.",
    },
    Key {
        section: "cache",
        name: "timeout",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.cache.timeout,
        doc: "How long Redis may take to answer before it counts as a miss. After a few such it is passed over until it answers again.",
    },
    Key {
        section: "jobs",
        name: "max_concurrency",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.jobs.max_concurrency,
        doc: "Background tasks that this server runs at once.",
    },
    Key {
        section: "jobs",
        name: "lease",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.jobs.lease,
        doc: "How long the tasks of a server that gives no sign of life wait before another one takes them. Keep it far above the difference between the servers' clocks.",
    },
    Key {
        section: "jobs",
        name: "max_file_bytes",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.jobs.max_file_bytes,
        doc: "Largest file that a client may upload. A larger one is answered 413.",
    },
    Key {
        section: "jobs",
        name: "max_batch_requests",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.jobs.max_batch_requests,
        doc: "Most requests of a batch. A batch of more fails when its input is checked.",
    },
    Key {
        section: "jobs",
        name: "retention",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.jobs.retention,
        doc: "How long uploaded files, batches and what they have written are kept, unless a request says otherwise. 0s: for good.",
    },
    Key {
        section: "jobs",
        name: "callback_secret",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.jobs.callback_secret,
        doc: "The key that callbacks of asynchronous inferences are signed with, as Standard Webhooks writes it. Make one with: echo whsec_$(openssl rand -base64 32). Empty: requests with a callback are refused.",
    },
    Key {
        section: "jobs",
        name: "callback_networks",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.jobs.callback_networks,
        doc: "Networks that callbacks may reach although they are not public, for clients on your own network. Whoever may send requests can then have this server post to anything in them.",
    },
    Key {
        section: "ai",
        name: "models",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.models,
        doc: "What to serve: names of the repository (NAME or NAME@VERSION), or paths of Hugging Face folders and GGUF files. Empty: everything in the repository.",
    },
    Key {
        section: "ai",
        name: "models_dir",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.models_dir,
        doc: "The model repository: a folder with one folder a model. Empty: `models` in the working directory, or else beside the executable or up to three folders above it.",
    },
    Key {
        section: "ai",
        name: "cache_dir",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.cache_dir,
        doc: "Where the algorithms timed for a GPU's products are kept for the next start, a file for each GPU model and driver. Empty: `eremois` in the user's cache folder (XDG_CACHE_HOME, or else `.cache` in HOME); with neither of them, they are timed anew at every start.",
    },
    Key {
        section: "ai",
        name: "default_model",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.default_model,
        doc: "The model that answers requests naming none. Empty: the first of ai.models, or else the repository's first by name.",
    },
    Key {
        section: "ai",
        name: "device",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.device,
        doc: "What to compute on. `auto`: the first GPU where this build and this machine have one, else the CPU. `cuda`: the first GPU or none; `cuda:0,2`: those, which share the work of every model.",
    },
    Key {
        section: "ai",
        name: "model_endpoint",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.model_endpoint,
        doc: "Where `eremois models pull` gets models from: the base address of a model hub or of a mirror of it. Empty: the variable HF_ENDPOINT, or else the hub's own address. Access tokens are read from HF_TOKEN only.",
    },
    Key {
        section: "ai",
        name: "max_batch_size",
        alias: Some("batch_size"),
        effect: Effect::Live,
        field: |s| &mut s.ai.max_batch_size,
        doc: "Most sequences in one batch.",
    },
    Key {
        section: "ai",
        name: "max_batch_tokens",
        alias: None,
        effect: Effect::Live,
        field: |s| &mut s.ai.max_batch_tokens,
        doc: "Most tokens in one batch. A model whose max_seq_len is larger is given its max_seq_len. Larger batches fill a GPU; on a CPU they only make neighbours wait. Lowered by the server itself, until settings are read again, where a GPU has no memory for so many; a raise that a GPU has no memory for is refused.",
    },
    Key {
        section: "ai",
        name: "max_queue_delay",
        alias: None,
        effect: Effect::Live,
        field: |s| &mut s.ai.max_queue_delay,
        doc: "How long an entry may wait for company while the device is idle. 0s: never; under load batches fill while the device is busy.",
    },
    Key {
        section: "ai",
        name: "max_queue_size",
        alias: None,
        effect: Effect::Live,
        field: |s| &mut s.ai.max_queue_size,
        doc: "Most inputs waiting for a model, on all its devices together. A request that does not fit is answered 429 with a Retry-After. Inputs of background work take other places, and no more of it is let in while half as many wait in all.",
    },
    Key {
        section: "ai",
        name: "heartbeat_interval",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.heartbeat_interval,
        doc: "How often an idle device is asked to compute something, so that readiness tells the truth.",
    },
    Key {
        section: "ai",
        name: "device_timeout",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.ai.device_timeout,
        doc: "A device that works on one batch for longer than this counts as hung, and its model as not ready if it has no other. A GPU does not come back from that: it is given up, and with a model's last device the server ends, to be started anew.",
    },
    Key {
        section: "log",
        name: "format",
        alias: None,
        effect: Effect::Restart,
        field: |s| &mut s.log.format,
        doc: "`human`: one line for people, coloured on a terminal. `json`: one object a line.",
    },
    Key {
        section: "log",
        name: "filter",
        alias: Some("level"),
        effect: Effect::Live,
        field: |s| &mut s.log.filter,
        doc: "A level (error, warn, info, debug, trace, off), or levels by module, such as `info,eremois::serve=debug`.",
    },
];

/// Index in [`KEYS`] of a section's key, by name or alias.
pub fn find(section: &str, name: &str) -> Option<usize> {
    KEYS.iter().position(|k| k.section == section && k.is_called(name))
}
