//! What a backup is encrypted with and opened with: age, with a passphrase or with keys.
//!
//! Without a key a backup is plain. It is as well checked for accidents then, but anybody can read it, and make another.

use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::path::Path;

use age::secrecy::SecretString;
use age::x25519::{Identity, Recipient};
use age::{DecryptError, Decryptor, Encryptor};

use crate::{Error, Result};

/// The first bytes of every age file. Source: age-encryption.org/v1.
const AGE: &[u8] = b"age-encryption.org/";

/// How the lines of age's secret keys begin.
const SECRET: &str = "AGE-SECRET-KEY-1";

/// Longest file of keys.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Opens backups, and locks them for whoever has it. Its secrets are wiped from memory when it is dropped, and never shown.
#[derive(Clone)]
pub enum Key {
    None,
    Passphrase(SecretString),
    /// Not empty.
    Identities(Vec<Identity>),
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Passphrase(_) => "Passphrase(***)",
            Self::Identities(_) => "Identities(***)",
        })
    }
}

impl Key {
    /// Reads a file that holds a passphrase in one line, or age's secret keys, one a line, with `#` before comments.
    /// `field` names the file in errors.
    ///
    /// Errors: [`Error::Invalid`] for a file that cannot be read or holds neither. No content is repeated.
    pub fn read(path: &Path, field: &str) -> Result<Self> {
        let invalid =
            |reason: &str| Error::Invalid { field: field.to_string(), reason: format!("{}: {reason}", path.display()) };
        let file = std::fs::File::open(path).map_err(|e| invalid(&e.to_string()))?;
        let mut text = String::new();
        file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(|e| invalid(&e.to_string()))?;
        if text.lines().any(|line| line.starts_with(SECRET)) {
            let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
            let identities = lines.map(|line| line.trim().parse()).collect::<Result<Vec<Identity>, _>>();
            return identities.map(Self::Identities).map_err(|_| invalid("a line is no secret key of age"));
        }
        let passphrase = text.trim_end_matches(['\n', '\r']);
        match passphrase {
            "" => Err(invalid("it is empty")),
            _ if passphrase.contains(['\n', '\r']) => Err(invalid("a passphrase is one line")),
            _ if passphrase.starts_with("age1") => Err(invalid("it holds no secret; give a recipient as --recipient")),
            _ => Ok(Self::Passphrase(SecretString::from(passphrase.to_string()))),
        }
    }

    /// What this key opens.
    pub fn lock(&self) -> Lock {
        match self {
            Self::None => Lock::Open,
            Self::Passphrase(passphrase) => Lock::Passphrase(passphrase.clone()),
            Self::Identities(identities) => Lock::Recipients(identities.iter().map(Identity::to_public).collect()),
        }
    }

    /// The content of a backup. Blocks: with a passphrase for about a second, which is what guessing one costs.
    ///
    /// Errors: `InvalidData` saying what is wrong with the key or the file.
    pub(super) fn open<R: BufRead + 'static>(&self, mut file: R) -> io::Result<Box<dyn Read>> {
        let is_locked = file.fill_buf()?.starts_with(AGE);
        let invalid = |reason: &str| Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        match (is_locked, self) {
            (false, Self::None) => Ok(Box::new(file)),
            (false, _) => invalid("it is not encrypted, or no backup: give no key if you trust it"),
            (true, Self::None) => invalid("it is encrypted: give --key-file or --identity"),
            (true, Self::Passphrase(passphrase)) => decrypted(file, &[&age::scrypt::Identity::new(passphrase.clone())]),
            (true, Self::Identities(identities)) => {
                let identities: Vec<&dyn age::Identity> = identities.iter().map(|one| one as _).collect();
                decrypted(file, &identities)
            }
        }
    }
}

fn decrypted<R: BufRead + 'static>(file: R, identities: &[&dyn age::Identity]) -> io::Result<Box<dyn Read>> {
    let decrypted = Decryptor::new_buffered(file).and_then(|file| file.decrypt(identities.iter().copied()));
    match decrypted {
        Ok(content) => Ok(Box::new(content)),
        Err(DecryptError::Io(e)) => Err(e),
        Err(error) => {
            let reason = match error {
                DecryptError::NoMatchingKeys | DecryptError::DecryptionFailed | DecryptError::KeyDecryptionFailed => {
                    "this key does not open it, or its first bytes were changed"
                }
                DecryptError::ExcessiveWork { .. } => "its passphrase would take too long to check: it was changed",
                _ => "the head of the encrypted file is damaged",
            };
            Err(io::Error::new(io::ErrorKind::InvalidData, reason))
        }
    }
}

/// Whom a backup is encrypted for.
#[derive(Clone)]
pub enum Lock {
    /// For everybody.
    Open,
    Passphrase(SecretString),
    /// Not empty.
    Recipients(Vec<Recipient>),
}

impl Lock {
    /// For recipients as age writes them, `age1…`. Errors: [`Error::Invalid`] naming the one that is none.
    pub fn recipients(texts: &[String]) -> Result<Self> {
        let recipient = |text: &String| {
            text.parse::<Recipient>().map_err(|_| Error::Invalid {
                field: "--recipient".to_string(),
                reason: format!("expected age1 and 58 characters, got {text:?}"),
            })
        };
        Ok(Self::Recipients(texts.iter().map(recipient).collect::<Result<_>>()?))
    }

    /// Whether anybody can read what is locked with it.
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Open)
    }

    /// A writer that encrypts. Blocks: as [`Key::open`].
    pub(super) fn wrap<W: Write>(&self, out: W) -> io::Result<Locked<W>> {
        let encryptor = match self {
            Self::Open => return Ok(Locked::Plain(out)),
            Self::Passphrase(passphrase) => Ok(Encryptor::with_user_passphrase(passphrase.clone())),
            Self::Recipients(recipients) => Encryptor::with_recipients(recipients.iter().map(|one| one as _)),
        };
        Ok(Locked::Age(encryptor.map_err(|e| io::Error::other(e.to_string()))?.wrap_output(out)?))
    }
}

/// See [`Lock::wrap`].
pub(super) enum Locked<W: Write> {
    Plain(W),
    Age(age::stream::StreamWriter<W>),
}

impl<W: Write> Locked<W> {
    /// Writes what tells the end from a cut.
    pub(super) fn finish(self) -> io::Result<W> {
        match self {
            Self::Plain(out) => Ok(out),
            Self::Age(out) => out.finish(),
        }
    }
}

impl<W: Write> Write for Locked<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(bytes),
            Self::Age(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.flush(),
            Self::Age(out) => out.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use age::secrecy::ExposeSecret;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn read(text: &str) -> Result<Key> {
        Key::read(file(text).path(), "--key-file")
    }

    fn locked(lock: &Lock, content: &[u8]) -> Vec<u8> {
        let mut out = lock.wrap(Vec::new()).unwrap();
        out.write_all(content).unwrap();
        out.finish().unwrap()
    }

    fn opened(key: &Key, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        key.open(io::Cursor::new(bytes.to_vec()))?.read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn a_file_holds_a_passphrase_or_keys() {
        let Ok(Key::Passphrase(found)) = read("correct horse\n") else { panic!("a passphrase") };
        assert_eq!(found.expose_secret(), "correct horse");
        let secret = Identity::generate();
        let text = format!("# made by age-keygen\n\n{}\n", secret.to_string().expose_secret());
        let Ok(Key::Identities(found)) = read(&text) else { panic!("keys") };
        assert_eq!(found[0].to_public().to_string(), secret.to_public().to_string());
        for bad in ["", "\n", "two\nlines", "AGE-SECRET-KEY-1NONE", &secret.to_public().to_string()] {
            match read(bad) {
                Err(Error::Invalid { field, reason }) => {
                    assert_eq!(field, "--key-file");
                    assert!(!reason.contains("AGE-SECRET"), "{reason}");
                }
                other => panic!("{bad:?}: {other:?}"),
            }
        }
        assert!(matches!(Key::read(Path::new("/nowhere"), "--identity"), Err(Error::Invalid { .. })));
    }

    #[test]
    fn only_its_own_key_opens_a_lock() {
        let identity = || Key::Identities(vec![Identity::generate()]);
        let (one, other) = (identity(), identity());
        let passphrase = Key::Passphrase(SecretString::from("right".to_string()));
        let wrong = Key::Passphrase(SecretString::from("wrong".to_string()));
        let content = b"secret";
        for (key, strangers) in [(&one, [&other, &passphrase, &Key::None]), (&passphrase, [&wrong, &one, &Key::None])] {
            let bytes = locked(&key.lock(), content);
            assert!(!bytes.windows(content.len()).any(|window| window == content));
            assert_eq!(opened(key, &bytes).unwrap(), content);
            for stranger in strangers {
                assert!(opened(stranger, &bytes).is_err(), "{key:?} {stranger:?}");
            }
        }
        let plain = locked(&Lock::Open, content);
        assert_eq!(opened(&Key::None, &plain).unwrap(), content);
        assert!(opened(&one, &plain).unwrap_err().to_string().contains("not encrypted"));
    }

    #[test]
    fn recipients_are_checked() {
        let good = Identity::generate().to_public().to_string();
        assert!(Lock::recipients(&[good.clone(), good]).is_ok());
        let bad = Lock::recipients(&["age1none".to_string()]);
        assert!(
            matches!(bad, Err(Error::Invalid { field, reason }) if field == "--recipient" && reason.contains("age1none"))
        );
    }
}
