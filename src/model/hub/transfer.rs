//! Fetching one file of the hub: redirects, resuming, checksum.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};
use url::Url;

use super::Progress;
use crate::model::repository::hex;
use crate::{Error, Result};

/// A server that does not take a connection for so long is not there.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that says nothing for so long has gone away; what came so far is kept.
pub const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Tries in a row that bring no byte. A line that drops now and then may drop for ever.
const MAX_IDLE_TRIES: u32 = 5;
/// The hub goes to its file store in one or two steps.
const MAX_REDIRECTS: usize = 8;

/// Fetches files with one agent.
pub struct Transfer {
    agent: Agent,
    token: Option<String>,
    retry_pause: Duration,
}

/// How a try ended that did not finish the file.
enum Interrupted {
    /// Another try cannot help.
    For(Error),
    /// The line dropped, or the server is not well.
    Again(String),
}

/// The checksum the hub gives as an ETag.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Checksum {
    /// Of large files: their bytes.
    Sha256(String),
    /// Of files inside git: a header with the length, then their bytes.
    GitBlob(String),
}

/// A file's length and checksum as the server told them; `None` where it did not.
#[derive(Debug, Default)]
struct Stated {
    num_bytes: Option<u64>,
    checksum: Option<Checksum>,
}

impl Transfer {
    /// `token` goes to the hub alone; `retry_pause` lies between two tries.
    pub fn new(token: Option<String>, retry_pause: Duration) -> Self {
        let agent = Agent::config_builder()
            .user_agent(concat!("eremois/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            // Followed by hand: the checksum stands on the redirect itself, and the token must not follow it
            // to another host.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // A compressed answer would have another length and another checksum than the file.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .build();
        Self { agent: agent.into(), token, retry_pause }
    }

    /// Fetches `url` into `path`, going on with `path.part` if an earlier try left one.
    ///
    /// The address must name a commit, so that a part and its rest belong together. `path` appears only once
    /// length and checksum were right.
    /// Blocks: until the file is here, for as long as bytes keep coming.
    /// Errors: [`Error::ModelFile`] naming the address; [`Error::Checksum`], after which the part is gone.
    pub fn fetch(&self, url: &str, name: &str, path: &Path, progress: &dyn Progress) -> Result<()> {
        let local = |e: std::io::Error| Error::ModelFile { file: path.to_path_buf(), reason: e.to_string() };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(local)?;
        }
        let part = part_of(path);
        let mut idle_tries = 0;
        let mut begun = false;
        let stated = loop {
            let before = len_of(&part);
            let mut begin = |size: u64, have: u64| {
                if !begun {
                    progress.begin(name, size, have);
                }
                begun = true;
            };
            match self.go_on(url, &part, &mut begin, progress) {
                Ok(stated) => break stated,
                Err(Interrupted::For(error)) => return Err(error),
                Err(Interrupted::Again(reason)) => {
                    idle_tries = if len_of(&part) > before { 0 } else { idle_tries + 1 };
                    if idle_tries == MAX_IDLE_TRIES {
                        return Err(remote(url, format!("{reason}; {} bytes are kept to go on from", len_of(&part))));
                    }
                    tracing::debug!(url, reason, "fetching was interrupted");
                    std::thread::sleep(self.retry_pause * 2u32.pow(idle_tries));
                }
            }
        };
        if let Err(error) = check(&part, url, &stated) {
            // Going on from bytes that are wrong would never end.
            fs::remove_file(&part).map_err(local)?;
            return Err(error);
        }
        fs::rename(&part, path).map_err(local)?;
        progress.end(name);
        Ok(())
    }

    /// One request: appends what is missing to the part.
    fn go_on(
        &self,
        url: &str,
        part: &Path,
        begin: &mut dyn FnMut(u64, u64),
        progress: &dyn Progress,
    ) -> Result<Stated, Interrupted> {
        let local =
            |e: std::io::Error| Interrupted::For(Error::ModelFile { file: part.to_path_buf(), reason: e.to_string() });
        let have = len_of(part);
        let (mut response, checksum) = self.get(url, have)?;
        let status = response.status();
        let content_range = header_of(&response, header::CONTENT_RANGE).map(str::to_string);
        let (from, num_bytes) = match status {
            StatusCode::OK => (0, response.body().content_length()),
            StatusCode::PARTIAL_CONTENT => match content_range.as_deref().and_then(parse_content_range) {
                Some((from, num_bytes)) if from == have => (from, num_bytes),
                other => {
                    let reason = format!("asked for bytes from {have}, got {other:?}");
                    return Err(Interrupted::For(remote(url, reason)));
                }
            },
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let num_bytes = content_range.as_deref().and_then(|r| r.strip_prefix("bytes */")?.parse().ok());
                if num_bytes == Some(have) {
                    // The last try ended between the last byte and the new name.
                    begin(have, have);
                    return Ok(Stated { num_bytes, checksum });
                }
                fs::remove_file(part).map_err(local)?;
                return Err(Interrupted::Again("the part was longer than the file".to_string()));
            }
            StatusCode::TOO_MANY_REQUESTS => return Err(Interrupted::Again(status.to_string())),
            status if status.is_server_error() => return Err(Interrupted::Again(status.to_string())),
            _ => return Err(Interrupted::For(refusal(url, url, &response))),
        };
        let mut file = OpenOptions::new().create(true).append(true).open(part).map_err(local)?;
        // A server that knows no ranges begins again.
        file.set_len(from).map_err(local)?;
        begin(num_bytes.unwrap_or(0), from);
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0u8; 1 << 17];
        loop {
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    file.write_all(&buffer[..n]).map_err(local)?;
                    progress.advance(n as u64);
                }
                Err(e) => return Err(Interrupted::Again(e.to_string())),
            }
        }
        match num_bytes {
            Some(num_bytes) if len_of(part) < num_bytes => {
                Err(Interrupted::Again(format!("the line closed at byte {} of {num_bytes}", len_of(part))))
            }
            _ => Ok(Stated { num_bytes, checksum }),
        }
    }

    /// Asks for the bytes from `from` on, through redirects. The checksum is the first one met on the way:
    /// the file store behind the hub has ETags of its own kind.
    fn get(&self, url: &str, from: u64) -> Result<(Response<Body>, Option<Checksum>), Interrupted> {
        let fatal = |e: Error| Interrupted::For(e);
        let first = Url::parse(url).map_err(|e| fatal(remote(url, e)))?;
        let mut here = first.clone();
        let mut checksum = None;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(here.as_str());
            if let Some(token) = self.token.as_ref().filter(|_| here.origin() == first.origin()) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| Interrupted::Again(e.to_string()))?;
            let etag = response.headers().get("x-linked-etag").or_else(|| response.headers().get(header::ETAG));
            checksum = checksum.or_else(|| Checksum::parse(etag?.to_str().ok()?));
            if !response.status().is_redirection() {
                return Ok((response, checksum));
            }
            let location = header_of(&response, header::LOCATION).unwrap_or_default();
            let next = here.join(location);
            here = next.map_err(|e| fatal(remote(here.as_str(), format!("redirects to `{location}`: {e}"))))?;
        }
        Err(fatal(remote(url, format!("more than {MAX_REDIRECTS} redirects"))))
    }
}

impl Checksum {
    /// `None` for an ETag that is no checksum.
    fn parse(etag: &str) -> Option<Self> {
        let digest = etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        match digest.len() {
            _ if !digest.bytes().all(|b| b.is_ascii_hexdigit()) => None,
            64 => Some(Self::Sha256(digest)),
            40 => Some(Self::GitBlob(digest)),
            _ => None,
        }
    }

    /// The same kind of checksum of a file here.
    fn of(&self, path: &Path) -> std::io::Result<Self> {
        let mut file = File::open(path)?;
        match self {
            Self::Sha256(_) => Ok(Self::Sha256(digest(Sha256::new(), &mut file)?)),
            Self::GitBlob(_) => {
                let header = format!("blob {}\0", file.metadata()?.len());
                Ok(Self::GitBlob(digest(Sha1::new_with_prefix(header), &mut file)?))
            }
        }
    }
}

impl Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sha256(digest) => f.write_str(digest),
            Self::GitBlob(digest) => write!(f, "git blob {digest}"),
        }
    }
}

/// Compares length and checksum, where they were stated.
fn check(part: &Path, url: &str, stated: &Stated) -> Result<()> {
    let got = len_of(part);
    if let Some(num_bytes) = stated.num_bytes.filter(|n| *n != got) {
        return Err(remote(url, format!("has {num_bytes} bytes, {got} came")));
    }
    let Some(expected) = &stated.checksum else { return Ok(()) };
    let got = expected.of(part).map_err(|e| Error::ModelFile { file: part.to_path_buf(), reason: e.to_string() })?;
    if got != *expected {
        let file = PathBuf::from(url);
        return Err(Error::Checksum { file, expected: expected.to_string(), got: got.to_string() });
    }
    Ok(())
}

fn digest<D: Digest>(mut hasher: D, file: &mut File) -> std::io::Result<String> {
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// `bytes 5-9/10` to where it begins and the whole length, `None` for `*`.
fn parse_content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (from, _) = range.split_once('-')?;
    Some((from.parse().ok()?, total.parse().ok()))
}

/// What a status of the hub means for the one who pulls. The hub answers 401 also for what does not
/// exist, so as not to tell strangers which private names do.
pub fn refusal(url: &str, what: &str, response: &Response<Body>) -> Error {
    let status = response.status();
    let code = response.headers().get("x-error-code").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let meaning = match (status.as_u16(), code) {
        (401, "GatedRepo") | (403, "GatedRepo") => {
            format!("{what} is gated: accept its terms on its page, then set HF_TOKEN to a token of that account")
        }
        (401, _) => format!("{what} does not exist, or is private: set HF_TOKEN to a token that may read it"),
        (403, _) => format!("the token in HF_TOKEN may not read {what}"),
        (404, "RevisionNotFound") => format!("{what} has no such revision"),
        (404, "EntryNotFound") => format!("{what} has no such file"),
        (404, _) => format!("{what} does not exist there"),
        _ => "the hub refuses it".to_string(),
    };
    let words = response.headers().get("x-error-message").and_then(|v| v.to_str().ok());
    let words = words.map(|w| format!(" ({w})")).unwrap_or_default();
    remote(url, format!("{meaning}: {status}{words}"))
}

/// A fault of a file that is not here: its address stands for its path.
pub fn remote(url: &str, reason: impl Display) -> Error {
    Error::ModelFile { file: PathBuf::from(url), reason: reason.to_string() }
}

fn header_of(response: &Response<Body>, name: header::HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(".part");
    PathBuf::from(name)
}

/// 0 for a file that is not there.
fn len_of(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_are_checksums_by_their_length() {
        let sha256 = "A".repeat(64);
        assert_eq!(Checksum::parse(&format!("\"{sha256}\"")), Some(Checksum::Sha256("a".repeat(64))));
        assert_eq!(Checksum::parse(&format!("W/\"{}\"", "0".repeat(40))), Some(Checksum::GitBlob("0".repeat(40))));
        for other in ["", "\"abc-12\"", &"g".repeat(64)] {
            assert_eq!(Checksum::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_git_blob_is_hashed_as_git_does() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "hello\n").unwrap();
        // `echo hello | git hash-object --stdin`
        let expected = Checksum::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".to_string());
        assert_eq!(expected.of(file.path()).unwrap(), expected);
    }

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(parse_content_range("bytes */10"), None);
        assert_eq!(parse_content_range("items 5-9/10"), None);
    }
}
