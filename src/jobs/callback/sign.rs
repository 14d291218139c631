//! The signature of a callback: HMAC-SHA256 over its id, time and body.

use std::fmt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Bytes of a key, as the standard asks for.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// The key that callbacks are signed with. Its text is in no log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Reads `whsec_` and base64 of 24 to 64 bytes. Errors: what is wrong with it, without the text itself.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix("whsec_").ok_or("expected `whsec_` before the key")?;
        let key = BASE64_STANDARD.decode(bare).map_err(|_| "expected base64 behind `whsec_`")?;
        if !KEY_BYTES.contains(&key.len()) {
            return Err(format!("expected {} to {} bytes, got {}", KEY_BYTES.start(), KEY_BYTES.end(), key.len()));
        }
        Ok(Self(key))
    }

    /// The value of `webhook-signature`: `v1,` and base64. `sent_at` is in seconds of Unix time.
    pub fn sign(&self, id: &str, sent_at: i64, body: &[u8]) -> String {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return String::new() };
        mac.update(format!("{id}.{sent_at}.").as_bytes());
        mac.update(body);
        format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_the_standards_example() {
        // The values of the test of its Python library: id, time, body and signature.
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, br#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn keys_that_are_none_are_refused_and_not_repeated() {
        for bad in ["", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_", "whsec_short", "whsec_c2hvcnQ=", "whsec_%%%"] {
            let fault = Secret::parse(bad).unwrap_err();
            assert!(bad.len() < 8 || !fault.contains(&bad[6..]), "{fault}");
        }
        assert_eq!(format!("{:?}", Secret(vec![1; 24])), "Secret(***)");
    }
}
