//! Where Redis is, as one address: a server, the sentinels that know it, or the nodes of a cluster.
//!
//! ```text
//! redis://[user:password@]host[:6379][/db]
//! redis+sentinel://[user:password@]host[:26379],host…/master-name[/db][?sentinel_user=…&sentinel_password=…]
//! redis+cluster://[user:password@]host[:6379],host…
//! rediss://… rediss+sentinel://… rediss+cluster://…     TLS; ?ca=/path/of/authority.pem for one that is not public
//! ```

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// An address, checked. Its `Display` and `Debug` hide passwords.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    pub topology: Topology,
    /// Host and port: one server, or the sentinels or nodes that are asked first. Not empty.
    pub nodes: Vec<(String, u16)>,
    pub is_tls: bool,
    /// User (`None`: the default one) and password of the servers that hold data.
    pub login: Option<Login>,
    /// The same of the sentinels, which have their own.
    pub sentinel_login: Option<Login>,
    /// The database's number; 0 in a cluster.
    pub db: u16,
    /// A file in PEM with the authorities that servers' certificates may be of, instead of the public ones.
    pub ca: Option<PathBuf>,
}

/// What is at the nodes of an [`Address`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Topology {
    Single,
    /// `master`: the name under which the sentinels watch it.
    Sentinel {
        master: String,
    },
    Cluster,
}

/// Who logs in.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    pub user: Option<String>,
    pub password: String,
}

impl Address {
    /// What may be written, for people.
    pub const FORM: &'static str =
        "redis://, redis+sentinel:// or redis+cluster:// (rediss… with TLS) and a host or several";
}

impl FromStr for Address {
    /// What is wrong, without the password.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = |why: &str| format!("{why}, got {:?}", masked(text));
        let form = || fault(&format!("expected {}", Self::FORM));
        let (scheme, rest) = text.split_once("://").ok_or_else(form)?;
        let (is_tls, kind) = match scheme.split_once('+').unwrap_or((scheme, "")) {
            ("redis", kind) => (false, kind),
            ("rediss", kind) => (true, kind),
            _ => return Err(form()),
        };
        if rest.contains('#') {
            return Err(fault("a # in a password is written %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        // The last @ ends the login: passwords may hold one.
        let (login, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (Some(read_login(login).map_err(|why| fault(&why))?), hosts),
            None => (None, authority),
        };
        if hosts.is_empty() {
            return Err(form());
        }
        let default_port = if kind == "sentinel" { 26379 } else { 6379 };
        let nodes: Result<Vec<_>, String> = hosts.split(',').map(|host| read_host(host, default_port)).collect();
        let nodes = nodes.map_err(|why| fault(&why))?;
        let (topology, db) = match kind {
            "" if nodes.len() > 1 => {
                return Err(fault(
                    "several hosts are sentinels (redis+sentinel://) or nodes of a cluster (redis+cluster://)",
                ));
            }
            "" => (Topology::Single, path),
            "sentinel" => match path.split_once('/').unwrap_or((path, "")) {
                ("", _) => return Err(fault("the name of the master is missing: redis+sentinel://hosts/NAME")),
                (master, db) => (Topology::Sentinel { master: decoded(master).map_err(|why| fault(&why))? }, db),
            },
            "cluster" if !path.is_empty() => return Err(fault("a cluster has only the database 0 and takes no path")),
            "cluster" => (Topology::Cluster, ""),
            _ => return Err(form()),
        };
        let db = match db {
            "" => 0,
            db => db.parse().map_err(|_| fault("the path is the number of a database"))?,
        };
        let mut address = Self { topology, nodes, is_tls, login, sentinel_login: None, db, ca: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            address.read_option(pair).map_err(|why| fault(&why))?;
        }
        if address.sentinel_login.as_ref().is_some_and(|login| login.password.is_empty()) {
            return Err(fault("sentinel_user without sentinel_password"));
        }
        Ok(address)
    }
}

impl Address {
    fn read_option(&mut self, pair: &str) -> Result<(), String> {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decoded(value)?;
        let is_sentinel = matches!(self.topology, Topology::Sentinel { .. });
        match name {
            "ca" if !self.is_tls => return Err("ca is for TLS: rediss".to_string()),
            "ca" if value.is_empty() => return Err("ca is the path of a file in PEM".to_string()),
            "ca" => self.ca = Some(PathBuf::from(value)),
            "sentinel_user" | "sentinel_password" if is_sentinel => {
                let login = self.sentinel_login.get_or_insert(Login { user: None, password: String::new() });
                match name {
                    "sentinel_user" => login.user = Some(value),
                    _ => login.password = value,
                }
            }
            _ => return Err(format!("{name:?} is no option here: ca, sentinel_user and sentinel_password are")),
        }
        Ok(())
    }
}

fn read_login(text: &str) -> Result<Login, String> {
    let Some((user, password)) = text.split_once(':') else {
        return Err("a login is user:password, or :password for the default user".to_string());
    };
    if password.is_empty() {
        return Err("the password is empty".to_string());
    }
    let user = decoded(user)?;
    Ok(Login { user: Some(user).filter(|user| !user.is_empty()), password: decoded(password)? })
}

fn read_host(text: &str, default_port: u16) -> Result<(String, u16), String> {
    let bad = || format!("{text:?} is no host and port");
    // An IPv6 address stands in brackets, because of its colons.
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(bad)?) })
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() || host.contains(['/', '@', ' ']) {
        return Err(bad());
    }
    let port = match port {
        None => default_port,
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?,
    };
    Ok((host.to_string(), port))
}

/// Without its percent signs: RFC 3986, section 2.1.
fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let digit = |at: usize| after.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &after[2..];
            }
            (b'%', ..) => return Err("a % is written %25".to_string()),
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).map_err(|_| "what is written with % is not UTF-8".to_string())
}

/// A text that may be no address, without what may be a password: for faults.
fn masked(text: &str) -> String {
    let (text, query) = text.split_once('?').map_or((text, ""), |(text, _)| (text, "?…"));
    let scheme_end = text.find("://").map_or(0, |at| at + 3);
    match (text[scheme_end..].rfind('@'), text[scheme_end..].find(':')) {
        (Some(at), Some(colon)) if colon < at => {
            format!("{}:***{}{query}", &text[..scheme_end + colon], &text[scheme_end + at..])
        }
        _ => format!("{text}{query}"),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_tls { "rediss" } else { "redis" })?;
        f.write_str(match self.topology {
            Topology::Single => "://",
            Topology::Sentinel { .. } => "+sentinel://",
            Topology::Cluster => "+cluster://",
        })?;
        if let Some(login) = &self.login {
            write!(f, "{}:***@", login.user.as_deref().unwrap_or_default())?;
        }
        let hosts = self.nodes.iter().map(|(host, port)| match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        });
        f.write_str(&hosts.collect::<Vec<_>>().join(","))?;
        if let Topology::Sentinel { master } = &self.topology {
            write!(f, "/{master}")?;
        }
        if self.db != 0 {
            write!(f, "/{}", self.db)?;
        }
        let ca = self.ca.iter().map(|ca| format!("ca={}", ca.display()));
        let sentinel = self.sentinel_login.iter().flat_map(|login| {
            let user = login.user.iter().map(|user| format!("sentinel_user={user}"));
            user.chain(["sentinel_password=***".to_string()]).collect::<Vec<_>>()
        });
        let options: Vec<String> = ca.chain(sentinel).collect();
        if options.is_empty() { Ok(()) } else { write!(f, "?{}", options.join("&")) }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:***", self.user.as_deref().unwrap_or_default())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Address {
        text.parse().unwrap_or_else(|why| panic!("{text}: {why}"))
    }

    #[test]
    fn every_topology_is_read() {
        let plain = parse("redis://cache");
        assert_eq!((plain.topology, plain.nodes), (Topology::Single, vec![("cache".to_string(), 6379)]));
        assert_eq!((plain.is_tls, plain.db, plain.login), (false, 0, None));
        let tls = parse("rediss://me:p%40ss@[::1]:7000/3?ca=/etc/ca.pem");
        assert_eq!((tls.nodes, tls.db, tls.is_tls), (vec![("::1".to_string(), 7000)], 3, true));
        assert_eq!(tls.login, Some(Login { user: Some("me".into()), password: "p@ss".into() }));
        assert_eq!(tls.ca, Some("/etc/ca.pem".into()));
        let sentinel = parse("redis+sentinel://:pw@a,b:9/main/2?sentinel_user=s&sentinel_password=t");
        assert_eq!(sentinel.topology, Topology::Sentinel { master: "main".into() });
        assert_eq!(sentinel.nodes, [("a".to_string(), 26379), ("b".to_string(), 9)]);
        assert_eq!(sentinel.login, Some(Login { user: None, password: "pw".into() }));
        assert_eq!(sentinel.sentinel_login, Some(Login { user: Some("s".into()), password: "t".into() }));
        assert_eq!(sentinel.db, 2);
        let cluster = parse("rediss+cluster://a:1,b:2,c:3");
        assert_eq!((cluster.topology, cluster.nodes.len(), cluster.is_tls), (Topology::Cluster, 3, true));
    }

    #[test]
    fn passwords_are_never_shown() {
        for (text, shown) in [
            ("redis://:s3cret@host/0", "redis://:***@host:6379"),
            ("rediss://me:s3cret@host:1/5", "rediss://me:***@host:1/5"),
            (
                "redis+sentinel://a,[::1]:2/m/1?sentinel_password=s3cret",
                "redis+sentinel://a:26379,[::1]:2/m/1?sentinel_password=***",
            ),
            ("redis+cluster://u:s3c@ret@a:1", "redis+cluster://u:***@a:1"),
        ] {
            assert_eq!(format!("{:?}", parse(text)), shown);
        }
    }

    #[test]
    fn faults_say_what_to_write_and_hide_the_password() {
        for (text, says) in [
            ("redis://", "expected redis://"),
            ("http://u:s3cret@host", "expected redis://"),
            ("redis", "expected redis://"),
            ("redis+ring://u:s3cret@a", "expected redis://"),
            ("redis://u:s3cret@a,b", "redis+sentinel://"),
            ("redis://u:s3cret@a/x", "number of a database"),
            ("redis://u:s3cret@a/70000", "number of a database"),
            ("redis://s3cret@a", "a login is user:password"),
            ("redis://u:@a", "the password is empty"),
            ("redis://u:s3cret#@a", "%23"),
            ("redis://u:s3cret%zz@a", "%25"),
            ("redis://u:s3cret@a:0", "no host and port"),
            ("redis://u:s3cret@a:port", "no host and port"),
            ("redis://u:s3cret@[::1", "no host and port"),
            ("redis+sentinel://u:s3cret@a", "name of the master is missing"),
            ("redis+sentinel://a/m?sentinel_user=x", "without sentinel_password"),
            ("redis+cluster://u:s3cret@a/1", "only the database 0"),
            ("redis://u:s3cret@a?ca=x", "ca is for TLS"),
            ("rediss://u:s3cret@a?sentinel_password=s3cret", "no option here"),
        ] {
            let why = text.parse::<Address>().expect_err(text);
            assert!(why.contains(says), "{text}: {why}");
            // A login without a colon may be a user's name: it is the one case where the text is shown.
            assert!(!why.contains("s3cret") || text == "redis://s3cret@a", "{text}: {why}");
        }
    }
}
