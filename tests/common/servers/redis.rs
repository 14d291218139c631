//! Redis: one server, one that asks for a user or TLS, a Sentinel's, a Cluster's.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::super::process::{free_address, wait_for};
use super::certificates::Certificates;
use super::{Daemon, bound, program};

/// The name of the user of [`Redis::with_user`].
pub const USER: &str = "eremois";
/// That user's password. Characters that a URL must escape are in it.
pub const PASSWORD: &str = "s3cr@t/1";
/// What the sentinels call the server they watch.
pub const MASTER_NAME: &str = "eremois";

/// One server. What it acknowledged is on disk: `appendfsync always`.
pub struct Redis {
    pub daemon: Daemon,
}

impl Redis {
    pub fn start() -> Option<Self> {
        Self::with("")
    }

    /// With more lines of settings.
    pub fn with(lines: &str) -> Option<Self> {
        let lines = lines.to_string();
        Self::with_settings(move |port, _| format!("port {port}\n{lines}\n"))
    }

    /// Takes only [`USER`], who may do anything but administrate.
    pub fn with_user() -> Option<Self> {
        let user = format!("user {USER} on >{PASSWORD} ~* &* +@all -@admin -@dangerous");
        Self::with(&format!("user default off\n{user}"))
    }

    /// Takes TLS only, with this certificate.
    pub fn with_tls(certificates: &Certificates) -> Option<Self> {
        let [authority, certificate, key] =
            [&certificates.authority, &certificates.certificate, &certificates.key].map(|path| path.display());
        let files = format!("tls-ca-cert-file {authority}\ntls-cert-file {certificate}\ntls-key-file {key}");
        Self::with_settings(move |port, _| format!("port 0\ntls-port {port}\ntls-auth-clients no\n{files}\n"))
    }

    fn with_settings(settings: impl Fn(u16, &Path) -> String + Send + Sync + Clone + 'static) -> Option<Self> {
        let program = program("EREMOIS_TEST_REDIS_SERVER", &["redis-server"])?;
        let daemon = Daemon::start(move |port, dir| {
            let text = settings(port, dir);
            command(&program, dir, &format!("appendonly yes\nappendfsync always\nsave \"\"\n{text}"), &[])
        });
        let redis = Self { daemon };
        redis.wait_until_loaded();
        Some(redis)
    }

    /// `redis://127.0.0.1:port`; a user or TLS is the caller's to add.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.daemon.port)
    }

    /// Starts it again on its data, after a kill, and waits until it has read them.
    pub fn start_again(&self) {
        assert!(self.daemon.start_again(), "{}", self.daemon.log());
        self.wait_until_loaded();
    }

    fn wait_until_loaded(&self) {
        wait_for("Redis to read its data", || {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect(self.daemon.address()).ok()?;
            stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).ok()?;
            stream.write_all(b"PING\r\n").ok()?;
            let mut first = [0; 8];
            let is_answer = match stream.read(&mut first) {
                Ok(len) => !first[..len].starts_with(b"-LOADIN"),
                // How a server of TLS answers a greeting in plain text; there are no data to read yet.
                Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
            };
            is_answer.then_some(())
        });
    }

    /// The answer to a command that must succeed; only without user and TLS.
    pub fn ask<T: ::redis::FromRedisValue>(&self, command: &[&str]) -> T {
        ask(self.daemon.port, command)
    }
}

/// A command that runs redis-server in the foreground on these settings.
fn command(program: &Path, dir: &Path, settings: &str, arguments: &[&str]) -> Command {
    let file = dir.join("redis.conf");
    // Sentinels keep what they learned in this file.
    if !file.exists() {
        let dir = dir.display();
        let usual =
            format!("bind 127.0.0.1\ndaemonize no\ndir {dir}\nlogfile {dir}/redis.log\npidfile {dir}/redis.pid\n");
        fs::write(&file, format!("{usual}{settings}")).expect("written");
    }
    let mut command = bound(program);
    command.current_dir(dir).arg(&file).args(arguments);
    command
}

fn ask<T: ::redis::FromRedisValue>(port: u16, words: &[&str]) -> T {
    try_ask(port, words).unwrap_or_else(|e| panic!("{words:?}: {e}"))
}

fn try_ask<T: ::redis::FromRedisValue>(port: u16, words: &[&str]) -> ::redis::RedisResult<T> {
    let mut connection = ::redis::Client::open(format!("redis://127.0.0.1:{port}"))?.get_connection()?;
    let mut command = ::redis::Cmd::new();
    words.iter().for_each(|word| {
        command.arg(*word);
    });
    command.query(&mut connection)
}

/// A server, two replicas of it, and three sentinels two of which must agree that it is away.
pub struct Sentinel {
    /// The first is the master at the start.
    pub nodes: Vec<Redis>,
    pub sentinels: Vec<Daemon>,
}

impl Sentinel {
    /// Starts them and waits until all know one another.
    pub fn start() -> Option<Self> {
        let program = program("EREMOIS_TEST_REDIS_SERVER", &["redis-server"])?;
        let master = Redis::with("repl-diskless-sync-delay 0")?;
        let master_port = master.daemon.port;
        let mut nodes = vec![master];
        for _ in 0..2 {
            nodes.push(Redis::with(&format!("repl-diskless-sync-delay 0\nreplicaof 127.0.0.1 {master_port}"))?);
        }
        wait_for_replicas(&nodes[1..]);
        let settings = format!(
            "sentinel monitor {MASTER_NAME} 127.0.0.1 {master_port} 2\n\
             sentinel down-after-milliseconds {MASTER_NAME} 1500\n\
             sentinel failover-timeout {MASTER_NAME} 5000\n"
        );
        let start = || {
            let (program, settings) = (program.clone(), settings.clone());
            Daemon::start(move |port, dir| command(&program, dir, &format!("port {port}\n{settings}"), &["--sentinel"]))
        };
        let sentinels: Vec<Daemon> = (0..3).map(|_| start()).collect();
        for sentinel in &sentinels {
            wait_for("the sentinels to know all", || {
                let facts: std::collections::HashMap<String, String> =
                    try_ask(sentinel.port, &["SENTINEL", "MASTER", MASTER_NAME]).ok()?;
                let is = |name: &str, count: &str| facts.get(name).is_some_and(|value| value == count);
                (is("num-slaves", "2") && is("num-other-sentinels", "2")).then_some(())
            });
        }
        Some(Self { nodes, sentinels })
    }

    /// The server that the sentinels name as master now.
    pub fn master(&self) -> &Redis {
        wait_for("a master that a sentinel names", || {
            self.sentinels.iter().find_map(|sentinel| {
                let address: Vec<String> =
                    try_ask(sentinel.port, &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME]).ok()?;
                self.nodes.iter().find(|node| address.get(1) == Some(&node.daemon.port.to_string()))
            })
        })
    }
}

/// Three masters that share the slots, and a replica of each: node i + 3 follows node i.
pub struct Cluster {
    pub nodes: Vec<Redis>,
}

impl Cluster {
    /// Starts it and waits until every node calls it whole and the replicas are in step.
    pub fn start() -> Option<Self> {
        let mut nodes = Vec::new();
        for _ in 0..6 {
            // The port on which nodes talk would be 10,000 higher, which may be no port at all.
            let between = free_address().port();
            nodes.push(Redis::with(&format!(
                "cluster-enabled yes\ncluster-port {between}\ncluster-node-timeout 2000\nrepl-diskless-sync-delay 0"
            ))?);
        }
        let ids: Vec<String> = nodes.iter().map(|node| node.ask(&["CLUSTER", "MYID"])).collect();
        for (i, (first, last)) in [("0", "5460"), ("5461", "10922"), ("10923", "16383")].into_iter().enumerate() {
            nodes[i].ask::<()>(&["CLUSTER", "ADDSLOTSRANGE", first, last]);
        }
        for (i, node) in nodes.iter().enumerate() {
            node.ask::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(i + 1).to_string()]);
        }
        for node in &nodes[1..] {
            let between: Vec<String> = node.ask(&["CONFIG", "GET", "cluster-port"]);
            nodes[0].ask::<()>(&["CLUSTER", "MEET", "127.0.0.1", &node.daemon.port.to_string(), &between[1]]);
        }
        let wait_all = |what: &str, part: &str| {
            for node in &nodes {
                wait_for(what, || node.ask::<String>(&["CLUSTER", "INFO"]).contains(part).then_some(()));
            }
        };
        wait_all("the nodes of a cluster to know one another", "cluster_known_nodes:6");
        for i in 0..3 {
            // The gossip may be behind: the node must know its master as one.
            wait_for("a replica to take its master", || {
                try_ask::<()>(nodes[i + 3].daemon.port, &["CLUSTER", "REPLICATE", &ids[i]]).ok()
            });
        }
        wait_for_replicas(&nodes[3..]);
        wait_all("the cluster to be whole", "cluster_state:ok");
        Some(Self { nodes })
    }

    /// Addresses of all nodes: `redis://127.0.0.1:port`.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Redis::url).collect()
    }
}

fn wait_for_replicas(replicas: &[Redis]) {
    for replica in replicas {
        wait_for("a replica in step", || {
            replica.ask::<String>(&["INFO", "replication"]).contains("master_link_status:up").then_some(())
        });
    }
}
