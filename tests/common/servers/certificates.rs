//! A certificate authority of a test's own, and a certificate for the loopback.

use std::fs;
use std::path::{Path, PathBuf};

/// Files in PEM.
pub struct Certificates {
    pub authority: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Certificates {
    /// Makes them in this folder, for `localhost` and 127.0.0.1.
    pub fn make(dir: &Path) -> Self {
        let authority_key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "authority of a test");
        let authority = params.self_signed(&authority_key).expect("the words above are well formed");
        let issuer = rcgen::Issuer::new(params, authority_key);

        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(["localhost".to_string(), "127.0.0.1".to_string()]);
        let certificate = params.expect("two names").signed_by(&key, &issuer).expect("an authority's signature");

        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).expect("written");
            path
        };
        Self {
            authority: write("authority.pem", authority.pem()),
            certificate: write("certificate.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
        }
    }
}
