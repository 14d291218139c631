//! From a connection string to a prepared database, at the first use and with one attempt at a time.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use mongodb::bson::Document;
use mongodb::options::{
    Acknowledgment, ClientOptions, ConnectionString, HostInfo, ReadConcern, ReadPreference, SelectionCriteria,
    WriteConcern,
};
use mongodb::{Client, Collection, Database};
use parking_lot::Mutex;

use super::coalescer::Coalescer;
use super::document::Stored;
use super::fault::fault;
use super::migrate::migrate;
use super::schema::{DOCUMENTS, INFERENCES, OUTPUTS, PARTS, TASKS};
use super::spill::{self, Chunk};
use super::work::{DocumentDocument, PartDocument, TaskDocument};
use super::{WRITE_TIMEOUT, step};
use crate::store::Migrated;
use crate::store::record::Record;
use crate::{Error, Result};

/// How long the driver looks for a primary, and how long it takes to connect. Within a call's deadline, so that what is
/// wrong is said and not only that it took too long.
const SELECTION_TIMEOUT: Duration = Duration::from_secs(2);

/// How often the driver looks at each server. Less than the time to find a primary, so that a call which meets a change of
/// primary still learns of the new one.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Where records are kept.
#[derive(Clone)]
pub struct MongoSettings {
    /// `mongodb://` or `mongodb+srv://`, with TLS, users and hosts as the driver reads them. Names the database; else it is
    /// `eremois`.
    pub url: String,
    /// Most connections to each server.
    pub pool_size: usize,
    /// Wins over the one that the url names.
    pub replica_set: Option<String>,
    /// How long records are kept; zero: for good.
    pub retention: Duration,
}

impl MongoSettings {
    /// What all servers of one database, and no others, have in common: for names in what they share beside it. The same
    /// for any order of the hosts, and whoever logs in.
    ///
    /// Errors: as [`super::MongoStore::new`].
    pub fn namespace(&self) -> Result<String> {
        let address = parse(&self.url)?;
        let mut hosts = match &address.host_info {
            HostInfo::HostIdentifiers(hosts) => hosts.iter().map(ToString::to_string).collect(),
            HostInfo::DnsRecord(name) => vec![name.clone()],
            // What the driver may learn to read: told apart by the database alone.
            _ => Vec::new(),
        };
        hosts.iter_mut().for_each(|host| host.make_ascii_lowercase());
        hosts.sort();
        let database = database_of(address.default_database.as_deref());
        let hash = blake3::hash(format!("{}/{database}", hosts.join(",")).as_bytes()).to_hex();
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || "-_".contains(*c);
        // The first part is for people, the second tells databases of one name apart.
        Ok(format!("{}-{}", database.chars().filter(is_plain).collect::<String>(), &hash[..16]))
    }
}

/// The database that a connection string names, or its default.
fn database_of(name: Option<&str>) -> &str {
    name.unwrap_or("eremois")
}

/// Errors: [`Error::Config`], without the user and the password.
fn parse(url: &str) -> Result<ConnectionString> {
    ConnectionString::parse(url).map_err(|error| {
        let reason = scrub(&error.kind.to_string(), url);
        Error::Config { faults: vec![format!("database.url: {reason}")] }
    })
}

impl fmt::Debug for MongoSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url: _, pool_size, replica_set, retention } = self;
        let mut out = f.debug_struct("MongoSettings");
        out.field("pool_size", pool_size).field("replica_set", replica_set).field("retention", retention);
        out.finish_non_exhaustive()
    }
}

/// A connected and prepared database.
pub(super) struct Connection {
    pub database: Database,
    pub inferences: Collection<Stored>,
    pub outputs: Collection<Chunk>,
    pub tasks: Collection<TaskDocument>,
    pub documents: Collection<DocumentDocument>,
    pub parts: Collection<PartDocument>,
    pub coalescer: Coalescer,
    pub migrated: Migrated,
}

impl Connection {
    /// The first record that a filter finds, whole.
    pub(super) async fn find(&self, filter: Document) -> Result<Option<Record>> {
        match step(0, self.inferences.find_one(filter)).await? {
            Some(stored) => self.record(stored, true).await,
            None => Ok(None),
        }
    }

    /// The record of a document, its chunks read where they are wanted or hold its input. `None` where it is just being
    /// deleted.
    pub(super) async fn record(&self, mut stored: Stored, with_output: bool) -> Result<Option<Record>> {
        if !with_output && stored.spilled.as_ref().is_some_and(|spilled| !spilled.with_input) {
            stored.spilled = None;
        }
        let Some(mut whole) = spill::join(&self.outputs, stored).await? else { return Ok(None) };
        if !with_output {
            whole.output = None;
        }
        whole.into_record().map(Some)
    }
}

type Attempt = Shared<BoxFuture<'static, Result<Arc<Connection>>>>;

/// Makes the one connection there is.
pub(super) struct Connector {
    plan: Arc<Plan>,
    /// The attempt under way, or the connection. One that failed is replaced by the next call.
    attempt: Mutex<Option<Attempt>>,
}

struct Plan {
    address: ConnectionString,
    settings: MongoSettings,
    /// Names this store in the lock.
    holder: String,
}

impl Connector {
    pub(super) fn new(settings: MongoSettings) -> Result<Self> {
        let address = parse(&settings.url)?;
        let holder = format!("eremois {} {}", env!("CARGO_PKG_VERSION"), uuid::Uuid::new_v4());
        Ok(Self { plan: Arc::new(Plan { address, settings, holder }), attempt: Mutex::new(None) })
    }

    /// The connection. All that wait for it share one attempt, which goes on when they stop waiting: an index takes as long
    /// as it takes.
    pub(super) async fn connection(&self) -> Result<Arc<Connection>> {
        let attempt = {
            let mut slot = self.attempt.lock();
            match &*slot {
                Some(attempt) if !matches!(attempt.peek(), Some(Err(_))) => attempt.clone(),
                _ => slot.insert(self.start()).clone(),
            }
        };
        attempt.await
    }

    /// How long records are kept.
    pub(super) fn retention(&self) -> Duration {
        self.plan.settings.retention
    }

    /// The database as it is: reached for, and neither compared nor changed.
    pub(super) async fn database(&self) -> Result<Database> {
        self.plan.database().await
    }

    fn start(&self) -> Attempt {
        let plan = self.plan.clone();
        let task = tokio::spawn(async move { plan.connect().await.map(Arc::new) });
        let ended = |e| Error::Internal { cause: format!("connecting to MongoDB ended early: {e}") };
        async move { task.await.unwrap_or_else(|e| Err(ended(e))) }.boxed().shared()
    }
}

impl Plan {
    async fn database(&self) -> Result<Database> {
        // With `mongodb+srv` this asks the name service for the hosts.
        let mut options = ClientOptions::parse(self.address.clone()).await.map_err(|e| self.scrubbed(fault(e)))?;
        self.set(&mut options);
        let name = database_of(options.default_database.as_deref()).to_string();
        Ok(Client::with_options(options).map_err(|e| self.scrubbed(fault(e)))?.database(&name))
    }

    async fn connect(&self) -> Result<Connection> {
        let database = self.database().await?;
        let migrated = migrate(&database, self.settings.retention, &self.holder).await?;
        Ok(Connection {
            inferences: database.collection(INFERENCES),
            outputs: database.collection(OUTPUTS),
            tasks: database.collection(TASKS),
            documents: database.collection(DOCUMENTS),
            parts: database.collection(PARTS),
            coalescer: Coalescer::start(database.clone()),
            database,
            migrated,
        })
    }

    /// What the contract needs wins over the connection string; what it leaves open is as that says.
    fn set(&self, options: &mut ClientOptions) {
        let MongoSettings { pool_size, replica_set, .. } = &self.settings;
        options.app_name.get_or_insert_with(|| "eremois".to_string());
        options.max_pool_size = Some(u32::try_from(*pool_size).unwrap_or(u32::MAX));
        if let Some(name) = replica_set {
            options.repl_set_name = Some(name.clone());
        }
        options.server_selection_timeout.get_or_insert(SELECTION_TIMEOUT);
        options.connect_timeout.get_or_insert(SELECTION_TIMEOUT);
        options.heartbeat_freq.get_or_insert(HEARTBEAT);
        // Acknowledged is what a majority has on disk, and read is only what cannot be undone by a change of primary.
        let write = WriteConcern::builder().w(Acknowledgment::Majority).journal(true).w_timeout(WRITE_TIMEOUT).build();
        options.write_concern = Some(write);
        options.read_concern = Some(ReadConcern::majority());
        options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
    }

    fn scrubbed(&self, error: Error) -> Error {
        let url = &self.settings.url;
        match error {
            Error::StoreUnavailable { cause } => Error::StoreUnavailable { cause: scrub(&cause, url) },
            Error::Internal { cause } => Error::Internal { cause: scrub(&cause, url) },
            other => other,
        }
    }
}

/// A message without the user and the password of a connection string, in case the driver repeats it.
fn scrub(message: &str, url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    // The last @ before the options: a password that is not escaped is one of the faults that are told here.
    let end = rest.find('?').unwrap_or(rest.len());
    let Some((user, _)) = rest[..end].rsplit_once('@') else { return message.to_string() };
    let mut message = message.replace(user, "***");
    if let Some((_, password)) = user.split_once(':').filter(|(_, password)| !password.is_empty()) {
        message = message.replace(password, "***");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> MongoSettings {
        MongoSettings { url: url.into(), pool_size: 16, replica_set: None, retention: Duration::ZERO }
    }

    #[test]
    fn passwords_stay_out_of_messages() {
        for url in [
            "mongodb://user:s3cr/et@host/db",
            "mongodb://user:s3cr%et@host/?x=1",
            "mongodb://user:s3cr@et@host/",
            "mongodb://user:s3cret@host:99999999/",
            "mongodb://user:s3cret@host/?readPreference=nonsense",
            "mongodb://user:s3cret@/",
        ] {
            let Err(error) = Connector::new(settings(url)) else { continue };
            let text = format!("{error} {error:?}");
            assert!(text.contains("database.url"), "{text}");
            assert!(!text.contains("s3cr"), "{url}: {text}");
        }
        assert!(!format!("{:?}", settings("mongodb://user:s3cret@host")).contains("s3cret"));
    }

    #[test]
    fn a_namespace_is_that_of_the_database() {
        let namespace = |url: &str| settings(url).namespace().unwrap();
        let one = namespace("mongodb://b:2,A/name");
        assert!(one.starts_with("name-") && one.len() == 21, "{one}");
        for same in ["mongodb://a:27017,b:2/name?tls=true", "mongodb://user:s3cret@B:2,a/name"] {
            assert_eq!(namespace(same), one);
        }
        for other in ["mongodb://a,b:2/other", "mongodb://a,b:3/name", "mongodb://a/name", "mongodb+srv://a.b.c/name"] {
            assert_ne!(namespace(other), one);
        }
        assert!(namespace("mongodb://a").starts_with("eremois-"));
        assert_eq!(namespace("mongodb://a"), namespace("mongodb://a/eremois"));
    }

    #[tokio::test]
    async fn what_the_contract_needs_wins_over_the_connection_string() {
        let url = "mongodb://a:1,b:2/name?w=1&journal=false&readPreference=secondary&replicaSet=x&connectTimeoutMS=700";
        let settings = MongoSettings { replica_set: Some("y".into()), ..settings(url) };
        let connector = Connector::new(settings).unwrap();
        let mut options = ClientOptions::parse(url).await.unwrap();
        connector.plan.set(&mut options);
        let write = options.write_concern.unwrap();
        assert_eq!((write.w, write.journal), (Some(Acknowledgment::Majority), Some(true)));
        assert_eq!(options.repl_set_name.as_deref(), Some("y"));
        assert_eq!(options.connect_timeout, Some(Duration::from_millis(700)));
        assert_eq!(options.server_selection_timeout, Some(SELECTION_TIMEOUT));
        assert_eq!(options.max_pool_size, Some(16));
        assert!(matches!(options.selection_criteria, Some(SelectionCriteria::ReadPreference(ReadPreference::Primary))));
    }
}
