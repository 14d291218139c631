//! Compressed bodies: those of requests are unpacked within the limit on bodies, those of answers are packed where the
//! client takes it and it pays.
//!
//! Not tower-http's layers, which work inside `poll` on the async threads: a body that is in memory already would hold
//! one for as long as all of it takes, and a request's decoder would take any window a client names. Here the codecs
//! are asked directly, and what takes longer than an async thread may be held goes to a blocking one.

use std::io::{self, Cursor, Read, Write};

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;

use super::ApiState;
use super::negotiate::{self, Codings};
use crate::{Error, Result};

/// The codings taken and written, as headers and messages list them.
pub const KNOWN: &str = "zstd, gzip, deflate, br";

/// Answers up to here are packed on the async thread: at the 50 MB/s of the slowest coding that takes a third of a
/// millisecond.
const MAX_INLINE_PACKED: usize = 16 << 10;

/// Unpacked bytes up to here are made on the async thread: at 300 MB/s and more that is a fifth of a millisecond.
pub const MAX_INLINE_UNPACKED: usize = 64 << 10;

/// Of zstd and brotli, their quickest. Of floats in JSON they leave 37 % and 41 % of the bytes so; what is slower gains
/// little or nothing, since digits of floats hardly repeat.
const LEVEL: u32 = 1;

/// Of gzip and deflate: 42 % are left. At level 1 this crate's codes are fixed and leave 62 %, and of base64 all; level 6
/// leaves 40 % at a third of the speed.
const DEFLATE_LEVEL: u32 = 2;

/// log2 of the largest window a zstd frame may ask memory for, 8 MiB.
///
/// Source: RFC 9659, which sets this bound for content codings.
const ZSTD_WINDOW_LOG: u32 = 23;

/// Brotli's window, 256 KiB: rows do not repeat themselves over more.
const BROTLI_WINDOW_LOG: u32 = 18;

/// A content coding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    Zstd,
    Brotli,
    Gzip,
    /// The zlib form, as RFC 9110 defines it.
    Deflate,
}

impl Coding {
    /// In the order they are preferred: the quickest first.
    pub const ALL: [Self; 4] = [Self::Zstd, Self::Gzip, Self::Deflate, Self::Brotli];

    /// Its name in headers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Brotli => "br",
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }

    /// The coding of this name in a header, in any case.
    pub fn named(name: &str) -> Option<Self> {
        // Source of the alias: RFC 9110, section 8.4.1.3.
        let name = if name.eq_ignore_ascii_case("x-gzip") { "gzip" } else { name };
        Self::ALL.into_iter().find(|coding| coding.as_str().eq_ignore_ascii_case(name))
    }

    fn reader(self, bytes: Bytes) -> io::Result<Box<dyn Read + Send>> {
        let packed = Cursor::new(bytes);
        Ok(match self {
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(decoder)
            }
            Self::Brotli => Box::new(brotli::Decompressor::new(packed, 4096)),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
            Self::Deflate => Box::new(flate2::bufread::ZlibDecoder::new(packed)),
        })
    }

    /// Errors: of memory alone.
    fn pack(self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let out = Vec::with_capacity(bytes.len() / 2);
        let level = flate2::Compression::new(DEFLATE_LEVEL);
        match self {
            Self::Zstd => zstd::bulk::compress(bytes, LEVEL as i32),
            Self::Brotli => {
                let mut writer = brotli::CompressorWriter::new(out, 4096, LEVEL, BROTLI_WINDOW_LOG);
                writer.write_all(bytes)?;
                Ok(writer.into_inner())
            }
            Self::Gzip => {
                let mut writer = flate2::write::GzEncoder::new(out, level);
                writer.write_all(bytes)?;
                writer.finish()
            }
            Self::Deflate => {
                let mut writer = flate2::write::ZlibEncoder::new(out, level);
                writer.write_all(bytes)?;
                writer.finish()
            }
        }
    }
}

/// A request's body on its way from its compressed form.
pub struct Unpacking {
    coding: Coding,
    reader: Box<dyn Read + Send>,
    out: Vec<u8>,
    /// Most unpacked bytes.
    limit: usize,
}

impl Unpacking {
    /// Errors: those of [`Self::read`].
    pub fn new(coding: Coding, bytes: Bytes, limit: usize) -> Result<Self> {
        let reader = coding.reader(bytes).map_err(|e| not_packed(coding, &e))?;
        Ok(Self { coding, reader, out: Vec::new(), limit })
    }

    /// Unpacks until there are `most` bytes, or all. Returns whether there are all.
    ///
    /// Errors: `TooLarge` above the limit, found with one byte more and none beyond it; `Malformed` for what is not in
    /// this form, or ends early.
    pub fn read(&mut self, most: usize) -> Result<bool> {
        let most = most.min(self.limit + 1);
        let num_wanted = most.saturating_sub(self.out.len());
        let read = (&mut self.reader).take(num_wanted as u64).read_to_end(&mut self.out);
        read.map_err(|e| not_packed(self.coding, &e))?;
        if self.out.len() > self.limit {
            let (got, limit) = (self.out.len(), self.limit);
            return Err(Error::TooLarge { field: "body".to_string(), got, limit, unit: "bytes" });
        }
        Ok(self.out.len() < most)
    }

    /// The rest. Errors: those of [`Self::read`].
    pub fn finish(mut self) -> Result<Vec<u8>> {
        while !self.read(usize::MAX)? {}
        Ok(self.out)
    }
}

fn not_packed(coding: Coding, error: &io::Error) -> Error {
    Error::Malformed { field: "body".to_string(), reason: format!("not {}: {error}", coding.as_str()) }
}

/// Layer: packs answers that are longer than `compress_above` where the client takes it.
///
/// Streams (events, contents of files) and raw rows of floats go as they are, unless the client refuses that.
pub async fn compress(State(state): State<ApiState>, request: Request, next: Next) -> Response {
    let wanted = negotiate::codings(request.headers());
    let response = next.run(request).await;
    pack(response, wanted, state.settings.compress_above).await
}

async fn pack(mut response: Response, wanted: Codings, above: usize) -> Response {
    let Some(len) = response.body().size_hint().exact().map(|len| len as usize).filter(|len| *len > 0) else {
        return response;
    };
    if response.headers().contains_key(header::CONTENT_ENCODING) {
        return response;
    }
    let pays = len > above && is_text(response.headers());
    if pays {
        // Also where this client takes it as it is: a cache between must not give it another client's form.
        response.headers_mut().append(header::VARY, HeaderValue::from_static("accept-encoding"));
    }
    let Some(coding) = wanted.best.filter(|_| pays || wanted.refuses_identity) else {
        return response;
    };
    let (mut parts, body) = response.into_parts();
    // In memory as a whole, as its exact length says: collecting it takes what is there and copies nothing.
    let bytes = body.collect().await.map_or_else(|_| Bytes::new(), |body| body.to_bytes());
    let packed = if len <= MAX_INLINE_PACKED {
        coding.pack(&bytes)
    } else {
        let bytes = bytes.clone();
        match tokio::task::spawn_blocking(move || coding.pack(&bytes)).await {
            Ok(packed) => packed,
            Err(error) => Err(io::Error::other(error)),
        }
    };
    match packed {
        Ok(packed) => {
            parts.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding.as_str()));
            parts.headers.remove(header::CONTENT_LENGTH);
            Response::from_parts(parts, Body::from(packed))
        }
        Err(error) => {
            tracing::error!(%error, coding = coding.as_str(), "an answer could not be compressed, and goes as it is");
            Response::from_parts(parts, Body::from(bytes))
        }
    }
}

/// JSON of all kinds and the metrics' text.
fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    essence == "application/json" || essence.ends_with("+json") || essence == "text/plain"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(coding: Coding, bytes: Vec<u8>, limit: usize) -> Result<Vec<u8>> {
        Unpacking::new(coding, bytes.into(), limit)?.finish()
    }

    #[test]
    fn what_is_packed_unpacks_to_the_same() {
        for coding in Coding::ALL {
            for len in [0, 1, 100, 100_000] {
                let text: Vec<u8> = (0..len).map(|i| b"0123456789,.-"[(i * i / 7) % 13]).collect();
                assert_eq!(unpacked(coding, coding.pack(&text).unwrap(), len), Ok(text), "{coding:?} {len}");
            }
        }
    }

    #[test]
    fn the_limit_is_on_what_comes_out() {
        for coding in Coding::ALL {
            let bomb = coding.pack(&vec![b' '; 64 << 20]).unwrap();
            assert!(bomb.len() < 1 << 20, "{coding:?}: {}", bomb.len());
            let mut unpacking = Unpacking::new(coding, bomb.into(), 1000).unwrap();
            assert_eq!(unpacking.read(1000), Ok(false), "{coding:?}");
            let error = Error::TooLarge { field: "body".into(), got: 1001, limit: 1000, unit: "bytes" };
            assert_eq!(unpacking.read(usize::MAX), Err(error), "{coding:?}");
            assert_eq!(unpacking.out.len(), 1001, "no more was made than what shows that it is too much");
        }
    }

    #[test]
    fn what_is_broken_or_short_is_an_error() {
        for coding in Coding::ALL {
            let whole = coding.pack(&(0..5000u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
            let mut wrong = whole.clone();
            wrong[..4].fill(0xff);
            for broken in [whole[..whole.len() / 2].to_vec(), wrong, b"{\"input\": 1}".to_vec()] {
                let error = unpacked(coding, broken, 1 << 20).unwrap_err();
                assert!(matches!(&error, Error::Malformed { field, .. } if field == "body"), "{coding:?}: {error:?}");
            }
        }
    }

    #[test]
    fn a_frame_cannot_ask_for_any_memory() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(&vec![7; 1 << 20]).unwrap();
        let error = unpacked(Coding::Zstd, encoder.finish().unwrap(), 8 << 20).unwrap_err();
        assert!(error.to_string().contains("not zstd"), "{error}");
    }
}
