//! One connection: send a body made before, wait for the last byte of the answer.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tower::Service;

use super::answer::{TAIL_BYTES, num_tokens};
use super::record::Failure;
use super::target::Target;

/// Opens connections, plain or TLS by the target's scheme.
#[derive(Clone)]
pub struct Connector(HttpsConnector<HttpConnector>);

impl Connector {
    /// Over TCP or, for https addresses, TLS with the roots that browsers trust.
    pub fn new() -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        // A request is one small write; waiting to fill a packet would be measured as the server's time.
        tcp.set_nodelay(true);
        Self(HttpsConnectorBuilder::new().with_webpki_roots().https_or_http().enable_http1().wrap_connector(tcp))
    }
}

impl Default for Connector {
    fn default() -> Self {
        Self::new()
    }
}

/// An answer, read to its end.
pub struct Answer {
    pub status: u16,
    pub num_tokens: Option<u64>,
    pub num_bytes: u64,
    /// Whole if that was asked for, else the last bytes only.
    pub body: Bytes,
}

/// A kept-alive connection to one target; opened when first needed and again after it broke.
pub struct Client {
    connector: Connector,
    /// `None` while there is no connection. Dropping it hangs up.
    sender: Option<SendRequest<Full<Bytes>>>,
    timeout: Duration,
    /// Keep answers whole, for checking.
    whole: bool,
}

impl Client {
    pub fn new(connector: Connector, timeout: Duration, whole: bool) -> Self {
        Self { connector, sender: None, timeout, whole }
    }

    /// Opens the connection unless it stands.
    ///
    /// Errors: [`Failure::Connect`]; [`Failure::Timeout`] if the target does not even accept within the timeout.
    pub async fn connect(&mut self, uri: &Uri) -> Result<(), Failure> {
        let connect = Self::open(&mut self.connector, &mut self.sender, uri);
        tokio::time::timeout(self.timeout, connect).await.unwrap_or(Err(Failure::Timeout))
    }

    /// Sends one body and reads the answer. After a failure the connection is given up.
    pub async fn post(&mut self, target: &Target, body: Bytes) -> Result<Answer, Failure> {
        let exchange = Self::exchange(&mut self.connector, &mut self.sender, target, body, self.whole);
        let answer = tokio::time::timeout(self.timeout, exchange).await.unwrap_or(Err(Failure::Timeout));
        if answer.is_err() {
            self.sender = None;
        }
        answer
    }

    async fn open(
        connector: &mut Connector,
        sender: &mut Option<SendRequest<Full<Bytes>>>,
        uri: &Uri,
    ) -> Result<(), Failure> {
        if sender.as_ref().is_some_and(|sender| !sender.is_closed()) {
            return Ok(());
        }
        let stream = connector.0.call(uri.clone()).await.map_err(|_| Failure::Connect)?;
        let (fresh, connection) = hyper::client::conn::http1::handshake(stream).await.map_err(|_| Failure::Connect)?;
        // Ends when the sender is dropped or the server hangs up; what went wrong is told to the sender.
        tokio::spawn(connection);
        *sender = Some(fresh);
        Ok(())
    }

    async fn exchange(
        connector: &mut Connector,
        sender: &mut Option<SendRequest<Full<Bytes>>>,
        target: &Target,
        body: Bytes,
        whole: bool,
    ) -> Result<Answer, Failure> {
        // A server may hang up an idle connection while we choose it. Not a byte was sent then, so that one more
        // try on a fresh connection asks nothing twice.
        for _ in 0..2 {
            Self::open(connector, sender, &target.uri).await?;
            let Some(open) = sender.as_mut() else { return Err(Failure::Connect) };
            if open.ready().await.is_err() {
                *sender = None;
                continue;
            }
            match open.send_request(Self::request(target, body.clone())).await {
                Ok(response) => return Self::read(response, whole).await,
                Err(e) if e.is_canceled() => *sender = None,
                Err(e) => return Err(failure(&e)),
            }
        }
        Err(Failure::Reset)
    }

    fn request(target: &Target, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = hyper::Method::POST;
        // HTTP/1.1 asks a server for the path alone; the host goes in its header.
        let path = target.uri.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = path.parse().expect("a URI's own path is a URI");
        *request.headers_mut() = target.headers.clone();
        request
    }

    async fn read(response: Response<hyper::body::Incoming>, whole: bool) -> Result<Answer, Failure> {
        let (head, mut body) = response.into_parts();
        let mut kept = BytesMut::new();
        let mut num_bytes = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| failure(&e))?;
            let Some(data) = frame.data_ref() else { continue };
            num_bytes += data.len() as u64;
            if whole {
                kept.extend_from_slice(data);
            } else {
                keep_tail(&mut kept, data);
            }
        }
        let num_tokens = num_tokens(&head.headers, &kept[kept.len().saturating_sub(TAIL_BYTES)..]);
        Ok(Answer { status: head.status.as_u16(), num_tokens, num_bytes, body: kept.freeze() })
    }
}

/// Appends `data` and forgets all but the last [`TAIL_BYTES`].
fn keep_tail(kept: &mut BytesMut, data: &[u8]) {
    kept.extend_from_slice(&data[data.len().saturating_sub(TAIL_BYTES)..]);
    let surplus = kept.len().saturating_sub(TAIL_BYTES);
    if surplus > 0 {
        kept.copy_within(surplus.., 0);
        kept.truncate(TAIL_BYTES);
    }
}

fn failure(e: &hyper::Error) -> Failure {
    if e.is_parse() || e.is_parse_status() { Failure::Protocol } else { Failure::Reset }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_end_of_all_frames() {
        let all: Vec<u8> = (0..3000u32).map(|i| (i % 251) as u8).collect();
        for frame_len in [1, 7, 511, 512, 513, 3000] {
            let mut kept = BytesMut::new();
            all.chunks(frame_len).for_each(|frame| keep_tail(&mut kept, frame));
            assert_eq!(kept, &all[3000 - TAIL_BYTES..], "frames of {frame_len}");
        }
    }
}
