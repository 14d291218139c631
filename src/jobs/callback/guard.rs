//! Which addresses callbacks may reach: public ones, and those of networks that the operator names.
//!
//! A client that may name a URL could otherwise have this server ask what only its network reaches (a cloud's metadata,
//! a database's port). The address is judged after the look-up of the name and is the one that is then connected to, so
//! that a name which changes between the two wins nothing.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::Name;
use ipnet::IpNet;
use tower::Service;

/// IPv4 networks that are not the public internet. Source: IANA IPv4 Special-Purpose Address Registry, and multicast.
const CLOSED_V4: &[(Ipv4Addr, u8)] = &[
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// The only IPv6 addresses handed out to the public. Source: IANA IPv6 Address Space, Global Unicast.
const OPEN_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Parts of it that lead elsewhere: Teredo and protocol assignments, documentation (two), 6to4.
/// Source: IANA IPv6 Special-Purpose Address Registry.
const CLOSED_V6: &[(Ipv6Addr, u8)] = &[
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Judges addresses.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// Networks that are reached although they are not public.
    allowed: Vec<IpNet>,
}

impl Guard {
    /// Lets through public addresses, and those of `allowed`.
    pub fn new(allowed: Vec<IpNet>) -> Self {
        Self { allowed }
    }

    /// Whether an address may be reached.
    pub fn allows(&self, address: IpAddr) -> bool {
        // `::ffff:10.0.0.1` is 10.0.0.1 by another name.
        let address = address.to_canonical();
        self.allowed.iter().any(|network| network.contains(&address)) || is_public(address)
    }

    /// Whether a URL can be one that is reached: what it names by a name is judged when it is looked up.
    ///
    /// Errors: the reason why not.
    pub fn check(&self, url: &str) -> Result<(), String> {
        let url = url::Url::parse(url).map_err(|e| format!("no URL: {e}"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("expected http:// or https://, got {}://", url.scheme()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("a URL with a user or password is not taken".to_string());
        }
        let address = match url.host() {
            Some(url::Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(url::Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            Some(url::Host::Domain(_)) => None,
            None => return Err("a URL without a host".to_string()),
        };
        match address.filter(|address| !self.allows(*address)) {
            Some(address) => Err(closed(address)),
            None => Ok(()),
        }
    }
}

fn closed(address: IpAddr) -> String {
    format!("{address} is not a public address (jobs.callback_networks allows others)")
}

fn is_public(address: IpAddr) -> bool {
    let within = |(network, len): (IpAddr, u8)| IpNet::new(network, len).is_ok_and(|net| net.contains(&address));
    match address {
        IpAddr::V4(_) => !CLOSED_V4.iter().any(|&(network, len)| within((network.into(), len))),
        IpAddr::V6(_) => {
            within((OPEN_V6.0.into(), OPEN_V6.1))
                && !CLOSED_V6.iter().any(|&(network, len)| within((network.into(), len)))
        }
    }
}

/// Looks names up, and hands on only what the guard allows.
#[derive(Debug, Clone)]
pub struct GuardedResolver(pub Guard);

impl Service<Name> for GuardedResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let guard = self.0.clone();
        Box::pin(async move {
            // The port is the connector's to set.
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let (open, shut): (Vec<_>, Vec<_>) = found.into_iter().partition(|address| guard.allows(address.ip()));
            match (open.is_empty(), shut.first()) {
                (true, Some(address)) => Err(io::Error::new(io::ErrorKind::PermissionDenied, closed(address.ip()))),
                _ => Ok(open.into_iter()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_open() {
        let guard = Guard::default();
        for open in ["1.1.1.1", "93.184.215.14", "172.32.0.1", "100.128.0.1", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
        {
            assert!(guard.allows(open.parse().unwrap()), "{open}");
        }
        let closed = [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "198.19.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "fec0::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::a00:1",
            "2002:a00:1::1",
            "2001::1",
            "2001:db8::1",
            "100::1",
        ];
        for closed in closed {
            assert!(!guard.allows(closed.parse().unwrap()), "{closed}");
        }
        let guard = Guard::new(vec!["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]);
        for open in ["10.1.2.3", "::ffff:10.0.0.1", "::1"] {
            assert!(guard.allows(open.parse().unwrap()), "{open}");
        }
        assert!(!guard.allows("127.0.0.1".parse().unwrap()));
    }

    #[test]
    fn urls_are_checked_before_they_are_asked() {
        let guard = Guard::default();
        for open in ["https://example.com/hook", "http://example.com:8080/?a=b", "https://1.1.1.1/"] {
            assert_eq!(guard.check(open), Ok(()), "{open}");
        }
        let closed = [
            "",
            "example.com",
            "ftp://example.com",
            "file:///etc/passwd",
            "http://user:word@example.com/",
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://[::1]:80/",
            "http://[::ffff:10.0.0.1]/",
            "http://169.254.169.254/latest/meta-data",
        ];
        for closed in closed {
            assert!(guard.check(closed).is_err(), "{closed}");
        }
    }

    #[tokio::test]
    async fn names_that_lead_inside_are_refused() {
        let mut resolver = GuardedResolver(Guard::default());
        let refused = resolver.call("localhost".parse().unwrap()).await.map(|found| found.count()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        let networks = ["127.0.0.0/8", "::1/128"].map(|network| network.parse().unwrap()).to_vec();
        let mut resolver = GuardedResolver(Guard::new(networks));
        assert!(resolver.call("localhost".parse().unwrap()).await.unwrap().count() > 0);
    }
}
