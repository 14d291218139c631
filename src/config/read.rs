//! From file, environment and command line to checked settings, with every fault on the way.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::keys::{self, KEYS, SECTIONS};
use super::values::Raw;
use super::words::DatabaseUrl;
use super::{Hub, Settings};
use crate::ops::device::DeviceSpec;
use crate::{Error, Result};

/// The file read when none is named.
pub const DEFAULT_FILE: &str = "eremois.toml";
/// Names the file where `--config` does not.
pub const FILE_VARIABLE: &str = "EREMOIS_CONFIG";

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    /// Line numbers start at 1.
    File {
        path: PathBuf,
        line: usize,
    },
    /// The variable's name.
    Environment(String),
    /// `--set`.
    CommandLine,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => f.write_str("the default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::CommandLine => f.write_str("--set"),
        }
    }
}

/// Everything settings are read from. Kept, so that reloading reads the same places again.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A file that must exist; `None` reads [`DEFAULT_FILE`] if there is one.
    pub file: Option<PathBuf>,
    /// `EREMOIS_*` and `HF_*` of the process.
    pub environment: Vec<(String, String)>,
    /// `SECTION.KEY=VALUE` from the command line.
    pub overrides: Vec<String>,
}

/// Checked settings and where each came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub settings: Settings,
    /// One for each of [`KEYS`].
    pub origins: Vec<Origin>,
    pub hub: Hub,
}

impl Sources {
    /// The places of this process. The one place where the environment is read.
    ///
    /// `file` is the command line's; `EREMOIS_CONFIG` comes second.
    pub fn of_process(file: Option<PathBuf>, overrides: Vec<String>) -> Self {
        let environment: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
            .filter(|(name, _)| name.starts_with("EREMOIS_") || name == "HF_ENDPOINT" || name == "HF_TOKEN")
            .collect();
        let named = environment.iter().find(|(name, value)| name == FILE_VARIABLE && !value.is_empty());
        let file = file.or_else(|| named.map(|(_, value)| PathBuf::from(value)));
        Self { file, environment, overrides }
    }

    /// The file that is read, or would be if it existed.
    pub fn path(&self) -> &Path {
        self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE))
    }

    /// The text of the file; `None` if none was named and there is no default one.
    pub fn text(&self) -> Result<Option<String>> {
        match std::fs::read_to_string(self.path()) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && self.file.is_none() => Ok(None),
            Err(e) => Err(Error::Config { faults: vec![format!("{}: {e}", self.path().display())] }),
        }
    }

    /// Reads and checks everything. Errors: [`Error::Config`] with all faults.
    pub fn load(&self) -> Result<Loaded> {
        let text = self.text()?;
        self.load_text(text.as_deref())
    }

    /// As [`Sources::load`], with the file's text given.
    pub fn load_text(&self, text: Option<&str>) -> Result<Loaded> {
        let mut reader = Reader::new();
        if let Some(text) = text {
            reader.file(self.path(), text);
        }
        for (name, value) in &self.environment {
            reader.variable(name, value);
        }
        for assignment in &self.overrides {
            reader.assignment(assignment);
        }
        let hub = self.hub(&reader.settings);
        reader.finish(hub)
    }

    fn hub(&self, settings: &Settings) -> Hub {
        let of = |wanted: &str| {
            let found = self.environment.iter().find(|(name, value)| name == wanted && !value.is_empty());
            found.map(|(_, value)| value.clone())
        };
        let endpoint = settings.ai.model_endpoint.as_ref().map(|url| url.0.clone());
        Hub { endpoint: endpoint.or_else(|| of("HF_ENDPOINT")), token: of("HF_TOKEN") }
    }
}

struct Reader {
    settings: Settings,
    origins: Vec<Origin>,
    faults: Vec<String>,
}

impl Reader {
    fn new() -> Self {
        Self { settings: Settings::default(), origins: vec![Origin::Default; KEYS.len()], faults: Vec::new() }
    }

    fn fault(&mut self, origin: &Origin, fault: impl std::fmt::Display) {
        self.faults.push(format!("{origin}: {fault}"));
    }

    fn set(&mut self, index: usize, raw: &Raw, origin: Origin) {
        match (KEYS[index].field)(&mut self.settings).set(raw) {
            Ok(()) => self.origins[index] = origin,
            Err(why) => {
                // A variable's name already says the key.
                let named = matches!(origin, Origin::Environment(_));
                let fault = if named { why } else { format!("{}: {why}", KEYS[index].path()) };
                self.fault(&origin, fault);
            }
        }
    }

    fn file(&mut self, path: &Path, text: &str) {
        let at = |offset: usize| Origin::File {
            path: path.to_path_buf(),
            line: 1 + text.bytes().take(offset).filter(|&b| b == b'\n').count(),
        };
        let (root, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let origin = at(error.span().map_or(0, |span| span.start));
            self.fault(&origin, format!("not TOML: {}", error.message()));
        }
        // What the parser recovered after a syntax error may be half a value: only names are judged then.
        let values_count = errors.is_empty();
        for (section, value) in in_file_order(root.get_ref()) {
            let origin = at(section.span().start);
            let name = section.get_ref().as_ref();
            let Some(table) = value.get_ref().as_table() else {
                self.fault(&origin, outside(name));
                continue;
            };
            if !SECTIONS.iter().any(|(known, _)| *known == name) {
                let hint = suggest(name, SECTIONS.iter().map(|(known, _)| known.to_string()));
                self.fault(&origin, format!("unknown section [{name}]{hint}"));
                continue;
            }
            let mut seen: Vec<(usize, &str)> = Vec::new();
            for (key, value) in in_file_order(table) {
                let origin = at(key.span().start);
                let key = key.get_ref().as_ref();
                let Some(index) = keys::find(name, key) else {
                    self.fault(&origin, format!("{name}.{key}: unknown key{}", suggest_key(name, key)));
                    continue;
                };
                if let Some((_, other)) = seen.iter().find(|(i, _)| *i == index) {
                    self.fault(&origin, format!("{name}.{key}: the same setting as {name}.{other}; write one of them"));
                }
                seen.push((index, key));
                if values_count {
                    self.set(index, &raw(value.get_ref()), origin);
                }
            }
        }
    }

    fn variable(&mut self, name: &str, value: &str) {
        let Some(rest) = name.strip_prefix("EREMOIS_") else { return };
        if is_foreign(rest) {
            return;
        }
        let origin = Origin::Environment(name.to_string());
        let lower = rest.to_lowercase();
        match lower.split_once("__").and_then(|(section, key)| keys::find(section, key)) {
            Some(index) => self.set(index, &Raw::Loose(value.to_string()), origin),
            None => {
                let known = KEYS.iter().map(keys::Key::variable).chain([FILE_VARIABLE.to_string()]);
                self.fault(&origin, format!("unknown variable{}", suggest(name, known)));
            }
        }
    }

    fn assignment(&mut self, assignment: &str) {
        let origin = Origin::CommandLine;
        let Some((path, value)) = assignment.split_once('=') else {
            return self.fault(&origin, format!("expected SECTION.KEY=VALUE, got {assignment:?}"));
        };
        let path = path.trim();
        match path.split_once('.').and_then(|(section, key)| keys::find(section, key)) {
            Some(index) => self.set(index, &Raw::Loose(value.to_string()), origin),
            None => {
                let hint = suggest(path, KEYS.iter().map(keys::Key::path));
                self.fault(&origin, format!("{path}: unknown key{hint}"));
            }
        }
    }

    fn finish(mut self, hub: Hub) -> Result<Loaded> {
        // Values that contradict each other mean something only where each alone is sound.
        if self.faults.is_empty() {
            self.check_together();
        }
        if self.faults.is_empty() {
            Ok(Loaded { settings: self.settings, origins: self.origins, hub })
        } else {
            Err(Error::Config { faults: self.faults })
        }
    }

    fn check_together(&mut self) {
        let settings = self.settings.clone();
        let mut fault = |section: &str, key: &str, why: String| {
            // Each call below names a key of the table; a test calls every one of them.
            let origin = keys::find(section, key).map_or(Origin::Default, |index| self.origins[index].clone());
            self.faults.push(format!("{origin}: {section}.{key}: {why}"));
        };
        let (api, ai) = (&settings.api, &settings.ai);
        if api.max_client_batch_size > ai.max_queue_size {
            let (got, limit) = (api.max_client_batch_size, ai.max_queue_size);
            let why = format!("{got} inputs never fit into a queue of ai.max_queue_size = {limit}");
            fault("api", "max_client_batch_size", why);
        }
        if api.timeout.is_zero() {
            fault("api", "timeout", "must be longer than 0s".to_string());
        }
        if api.grpc_listen.is_some_and(|grpc| grpc.port() != 0 && grpc == api.listen) {
            fault("api", "grpc_listen", format!("{} is already api.listen", api.listen));
        }
        if settings.database.replica_set.is_some() && settings.database.url == DatabaseUrl::Embedded {
            fault("database", "replica_set", "needs a MongoDB database.url".to_string());
        }
        if settings.jobs.lease < Duration::from_secs(1) {
            fault("jobs", "lease", "must be at least 1s".to_string());
        }
        if matches!(ai.device, DeviceSpec::Cuda(_)) && !cfg!(feature = "cuda") {
            let why = format!("{} needs a build with the feature `cuda`; this build computes on the CPU", ai.device);
            fault("ai", "device", why);
        }
        for (key, value) in [("heartbeat_interval", ai.heartbeat_interval), ("device_timeout", ai.device_timeout)] {
            if value.is_zero() {
                fault("ai", key, "must be longer than 0s".to_string());
            }
        }
    }
}

/// Variables that begin like ours and are not settings: the file's own, those of the tests, and those an
/// orchestrator sets for a service that is called eremois.
fn is_foreign(rest: &str) -> bool {
    rest == "CONFIG" || rest == "PORT" || ["PORT_", "SERVICE_", "TEST_"].iter().any(|prefix| rest.starts_with(prefix))
}

type Entry<'a, 'i> = (&'a Spanned<DeString<'i>>, &'a Spanned<DeValue<'i>>);

/// The parser's table is sorted by name; faults are read beside the file.
fn in_file_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<Entry<'a, 'i>> {
    let mut entries: Vec<Entry<'a, 'i>> = table.iter().collect();
    entries.sort_by_key(|(name, _)| name.span().start);
    entries
}

fn outside(name: &str) -> String {
    match KEYS.iter().find(|key| key.is_called(name)) {
        Some(key) => format!("{name}: a key outside its section; it belongs under [{}]", key.section),
        None if SECTIONS.iter().any(|(section, _)| *section == name) => {
            format!("{name}: a section, written [{name}], not a key")
        }
        None => format!("{name}: unknown key outside any section"),
    }
}

fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) => {
            // TOML allows any size; what leaves an i64 is out of every key's range alike.
            let wide = i64::from_str_radix(number.as_str(), number.radix());
            Raw::Integer(wide.unwrap_or(if number.as_str().starts_with('-') { i64::MIN } else { i64::MAX }))
        }
        DeValue::Array(items) => Raw::List(items.iter().map(|item| raw(item.get_ref())).collect()),
        DeValue::Boolean(_) => Raw::Other("boolean"),
        DeValue::Float(_) => Raw::Other("float"),
        DeValue::Table(_) => Raw::Other("table"),
        DeValue::Datetime(_) => Raw::Other("date"),
    }
}

fn suggest_key(section: &str, key: &str) -> String {
    if let Some(other) = KEYS.iter().find(|k| k.is_called(key)) {
        return format!("; did you mean {}?", other.path());
    }
    let own = KEYS.iter().filter(|k| k.section == section);
    suggest(key, own.flat_map(|k| [Some(k.name), k.alias]).flatten().map(str::to_string))
}

/// "; did you mean `X`?" where a known word is close enough, else nothing.
pub fn suggest(word: &str, known: impl Iterator<Item = String>) -> String {
    let lower = word.to_lowercase();
    let score = |candidate: &String| strsim::jaro_winkler(&lower, &candidate.to_lowercase());
    let best = known.map(|candidate| (score(&candidate), candidate)).max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        // Below this, what is suggested has little more than its first letter in common with what was typed.
        Some((score, candidate)) if score >= 0.8 => format!("; did you mean {candidate}?"),
        _ => String::new(),
    }
}
