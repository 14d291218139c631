//! From an address to a connection: a server's, the one that sentinels name, or a cluster's.

use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, Pipeline,
    RedisConnectionInfo, RedisResult, TlsCertificates, TlsMode, Value,
};

use super::address::{Address, Login, Topology};
use crate::{Error, Result};

/// Commands that may wait for the one task that writes to the socket. With fewer, a burst of requests would wait
/// outside, each with its own wake-up.
const BUFFERED_COMMANDS: usize = 1024;

/// What a node of a cluster may take for a command before the connection is given up for it. Callers wait less.
const NODE_TIMEOUT: Duration = Duration::from_millis(500);

/// One connection for all requests: commands of many are under way on it at once. Clones share it.
#[derive(Clone)]
pub enum Connection {
    Node(MultiplexedConnection),
    /// One to every node, kept up by the client itself as slots and nodes change.
    Cluster(ClusterConnection),
}

impl Connection {
    /// Sends a command and waits for its answer.
    pub async fn ask(&mut self, command: &Cmd) -> RedisResult<Value> {
        let answer = match self {
            Self::Node(node) => node.req_packed_command(command).await,
            Self::Cluster(cluster) => cluster.req_packed_command(command).await,
        };
        answer?.extract_error()
    }

    /// Sends commands in one piece and waits for all answers. Errors: the first of any of them.
    pub async fn ask_all(&mut self, commands: &Pipeline) -> RedisResult<()> {
        match self {
            Self::Node(node) => commands.exec_async(node).await,
            Self::Cluster(cluster) => commands.exec_async(cluster).await,
        }
    }

    /// Whether every server answers: in a cluster every master, for a third of the keys is no cache.
    pub async fn ping(&mut self) -> RedisResult<()> {
        self.ask(&redis::cmd("PING")).await.map(drop)
    }
}

/// Makes connections to an address.
pub struct Connector {
    address: Address,
    certificates: Option<TlsCertificates>,
    node_timeout: Duration,
}

impl Connector {
    /// Errors: [`Error::Config`] for a file of certificates that cannot be read.
    pub fn new(address: Address) -> Result<Self> {
        let certificates = match &address.ca {
            None => None,
            Some(path) => {
                let root = std::fs::read(path)
                    .map_err(|e| Error::Config { faults: vec![format!("cache.url: ca: {}: {e}", path.display())] })?;
                Some(TlsCertificates { client_tls: None, root_cert: Some(root) })
            }
        };
        Ok(Self { address, certificates, node_timeout: NODE_TIMEOUT })
    }

    /// The same, for calls that a node of a cluster may answer later than others: those that wait there.
    pub fn with_node_timeout(self, node_timeout: Duration) -> Self {
        Self { node_timeout, ..self }
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    /// A new connection, which has logged in. Of sentinels, each call asks anew who the master is.
    pub async fn connect(&self) -> RedisResult<Connection> {
        match &self.address.topology {
            Topology::Single => {
                let (host, port) = self.address.nodes[0].clone();
                let info = self.info(self.at(host, port))?;
                self.connect_node(self.client(info)?).await
            }
            Topology::Sentinel { master } => {
                let mut sentinels = self.sentinels(master)?.build()?;
                self.connect_node(sentinels.async_get_client().await?).await
            }
            Topology::Cluster => {
                let nodes: RedisResult<Vec<ConnectionInfo>> =
                    self.address.nodes.iter().map(|(host, port)| self.info(self.at(host.clone(), *port))).collect();
                let mut builder = ClusterClientBuilder::new(nodes?)
                    .connection_timeout(NODE_TIMEOUT)
                    .response_timeout(self.node_timeout)
                    // Enough for a slot that has moved. More would only repeat what nobody waits for any more.
                    .retries(2);
                if let Some(certificates) = &self.certificates {
                    builder = builder.certs(certificates.clone());
                }
                Ok(Connection::Cluster(builder.build()?.get_async_connection().await?))
            }
        }
    }

    async fn connect_node(&self, client: Client) -> RedisResult<Connection> {
        // No time-outs here: whoever asks has one, and the whole of this too.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(BUFFERED_COMMANDS);
        Ok(Connection::Node(client.get_multiplexed_async_connection_with_config(&config).await?))
    }

    fn client(&self, info: ConnectionInfo) -> RedisResult<Client> {
        match &self.certificates {
            Some(certificates) => Client::build_with_tls(info, certificates.clone()),
            None => Client::open(info),
        }
    }

    fn at(&self, host: String, port: u16) -> ConnectionAddr {
        match self.address.is_tls {
            true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
            false => ConnectionAddr::Tcp(host, port),
        }
    }

    fn info(&self, at: ConnectionAddr) -> RedisResult<ConnectionInfo> {
        let mut settings = RedisConnectionInfo::default().set_db(i64::from(self.address.db));
        if let Some(Login { user, password }) = &self.address.login {
            settings = settings.set_password(password);
            settings = user.iter().fold(settings, |settings, user| settings.set_username(user));
        }
        Ok(at.into_connection_info()?.set_redis_settings(settings))
    }

    fn sentinels(&self, master: &str) -> RedisResult<SentinelClientBuilder> {
        let at = self.address.nodes.iter().map(|(host, port)| self.at(host.clone(), *port));
        let mut builder = SentinelClientBuilder::new(at, master, SentinelServerType::Master)?
            .set_client_to_redis_db(i64::from(self.address.db));
        if let Some(Login { user, password }) = &self.address.login {
            builder = builder.set_client_to_redis_password(password);
            builder = user.iter().fold(builder, |builder, user| builder.set_client_to_redis_username(user));
        }
        if let Some(Login { user, password }) = &self.address.sentinel_login {
            builder = builder.set_client_to_sentinel_password(password);
            builder = user.iter().fold(builder, |builder, user| builder.set_client_to_sentinel_username(user));
        }
        if self.address.is_tls {
            builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
            builder = builder.set_client_to_sentinel_tls_mode(TlsMode::Secure);
        }
        if let Some(certificates) = &self.certificates {
            builder = builder.set_client_to_redis_certificates(certificates.clone());
            builder = builder.set_client_to_sentinel_certificates(certificates.clone());
        }
        Ok(builder)
    }
}
