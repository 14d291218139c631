//! `/v1/files`: content comes in and goes out part by part, whatever its length.

use std::task::Poll;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, Multipart, Path, RawQuery, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use utoipa::ToSchema;

use super::super::ApiState;
use super::super::body;
use super::super::docs::Refusals;
use super::super::status::Fault;
use super::id_of;
use super::wire::{DeletedFile, ExpiresAfter, FileList, FileObject, ListQuery};
use crate::jobs::files::{FileQuery, Order, Purpose, Upload};
use crate::{Error, Result};

/// Most files of a page, and how many there are where the client does not say.
const MAX_LIMIT: usize = 10_000;

/// Longest value of a field beside the file, and longest name of a file.
const MAX_FIELD_BYTES: usize = 1024;
const MAX_FILENAME_CHARS: usize = 255;

/// Most fields of an upload; there are four.
const MAX_FIELDS: usize = 16;

/// What an upload has around its file: the other fields, and the lines between them.
const ENVELOPE_BYTES: usize = 64 << 10;

/// How long a refused upload may go on sending, so that its client comes to read why: one that is closed with bytes unread
/// may see a broken connection and no answer.
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// The fields of an upload, for the document: they are read as they come.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct FileBody {
    /// JSON lines, each a request.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// "batch".
    #[schema(example = "batch")]
    purpose: String,
    /// "created_at".
    #[schema(rename = "expires_after[anchor]")]
    anchor: Option<String>,
    /// 3600 to 2592000.
    #[schema(rename = "expires_after[seconds]")]
    seconds: Option<u64>,
}

/// Takes a file for batches. When this is answered it is there, whole.
#[utoipa::path(
    post, path = "/v1/files", tag = "OpenAI",
    request_body(content = FileBody, content_type = "multipart/form-data"),
    responses((status = 200, body = FileObject, description = "The file"), Refusals),
)]
pub async fn create(State(state): State<ApiState>, request: Request) -> Result<axum::Json<FileObject>, Fault> {
    state.check_durable("file")?;
    body::check_multipart(request.headers())?;
    let limit = state.jobs.max_file_bytes;
    let announced = request.body().size_hint().lower() as usize;
    if announced > limit.saturating_add(ENVELOPE_BYTES) {
        let mut body = request.into_body().into_data_stream();
        let _ = tokio::time::timeout(DISCARD_TIME, async { while let Some(Ok(_)) = body.next().await {} }).await;
        return Err(Error::TooLarge { field: "file".to_string(), got: announced, limit, unit: "bytes" }.into());
    }
    let request = request.map(|body| Body::from_stream(one_by_one(body)));
    let form = Multipart::from_request(request, &state).await;
    let mut form = form.map_err(|e| malformed("body", e.body_text()))?;
    match take(&state, &mut form).await {
        Ok(Taken { upload, filename, expires_after }) => {
            let file = upload.finish(filename, Purpose::Batch, expires_after).await?;
            Ok(axum::Json(FileObject::from(&file)))
        }
        Err(fault) => {
            let rest = async {
                while let Ok(Some(mut field)) = form.next_field().await {
                    while let Ok(Some(_)) = field.chunk().await {}
                }
            };
            let _ = tokio::time::timeout(DISCARD_TIME, rest).await;
            Err(fault)
        }
    }
}

/// The pieces of a body, and a break after each: the reader of forms takes all that is there at once, and what is there
/// must not depend on how fast it comes.
fn one_by_one(body: Body) -> impl Stream<Item = Result<Bytes, axum::Error>> {
    let mut pieces = body.into_data_stream();
    let mut has_given = false;
    stream::poll_fn(move |context| {
        if std::mem::take(&mut has_given) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let piece = pieces.poll_next_unpin(context);
        has_given = matches!(piece, Poll::Ready(Some(_)));
        piece
    })
}

/// An upload that is read to its end.
struct Taken {
    upload: Upload,
    filename: String,
    expires_after: Option<Duration>,
}

/// What was said beside the file.
#[derive(Default)]
struct Fields {
    has_purpose: bool,
    anchor: Option<String>,
    seconds: Option<u64>,
}

/// Reads all fields, in whatever order they come.
async fn take(state: &ApiState, form: &mut Multipart) -> Result<Taken, Fault> {
    let idle = state.settings.timeout;
    let mut file: Option<(Upload, String)> = None;
    let mut fields = Fields::default();
    for _ in 0..MAX_FIELDS {
        let Some(mut field) = timed(idle, form.next_field()).await? else {
            let (upload, filename) = file.ok_or_else(|| missing("file"))?;
            return Ok(Taken { upload, filename, expires_after: fields.checked()? });
        };
        match field.name().unwrap_or_default().to_string().as_str() {
            "file" if file.is_some() => return Err(invalid("file", "is given twice").into()),
            "file" => {
                let filename = filename(field.file_name())?;
                let mut upload = state.files().upload();
                while let Some(bytes) = timed(idle, field.chunk()).await? {
                    upload.write(&bytes).await?;
                }
                file = Some((upload, filename));
            }
            "purpose" => match text(&mut field, idle).await?.as_str() {
                "batch" => fields.has_purpose = true,
                other => {
                    let reason = format!("files are taken for the purpose `batch` alone, got `{other}`");
                    return Err(invalid("purpose", reason).into());
                }
            },
            "expires_after[anchor]" => fields.anchor = Some(text(&mut field, idle).await?),
            "expires_after[seconds]" => {
                let text = text(&mut field, idle).await?;
                let seconds = text.parse().map_err(|_| malformed("expires_after.seconds", "expected a number"))?;
                fields.seconds = Some(seconds);
            }
            // Not known, and not used.
            _ => while timed(idle, field.chunk()).await?.is_some() {},
        }
    }
    Err(Error::TooLarge { field: "body".to_string(), got: MAX_FIELDS + 1, limit: MAX_FIELDS, unit: "fields" }.into())
}

impl Fields {
    /// How long the file is kept, if that was said. Errors: `Malformed` and `Invalid` naming the field.
    fn checked(self) -> Result<Option<Duration>> {
        if !self.has_purpose {
            return Err(missing("purpose"));
        }
        let (anchor, seconds) = match (self.anchor, self.seconds) {
            (None, None) => return Ok(None),
            (Some(anchor), Some(seconds)) => (anchor, seconds),
            (None, Some(_)) => return Err(missing("expires_after.anchor")),
            (Some(_), None) => return Err(missing("expires_after.seconds")),
        };
        let seconds = ExpiresAfter { anchor, seconds }.checked("expires_after")?;
        Ok(Some(Duration::from_secs(seconds)))
    }
}

/// Waits for more of the body. Errors: `SlowBody`, and `Malformed` for what is no form or breaks off.
async fn timed<T>(idle: Duration, more: impl Future<Output = Result<T, MultipartError>>) -> Result<T, Fault> {
    match tokio::time::timeout(idle, more).await {
        Ok(Ok(more)) => Ok(more),
        Ok(Err(e)) => Err(malformed("body", e.body_text()).into()),
        Err(_) => Err(Fault::SlowBody { timeout: idle }),
    }
}

/// The value of a short field.
async fn text(field: &mut Field<'_>, idle: Duration) -> Result<String, Fault> {
    let name = field.name().unwrap_or_default().to_string();
    let mut value = Vec::new();
    while let Some(bytes) = timed(idle, field.chunk()).await? {
        value.extend_from_slice(&bytes);
        let (got, limit) = (value.len(), MAX_FIELD_BYTES);
        if got > limit {
            return Err(Error::TooLarge { field: name, got, limit, unit: "bytes" }.into());
        }
    }
    Ok(String::from_utf8(value).map_err(|_| malformed(&name, "is not UTF-8"))?)
}

/// Errors: `TooLarge` naming `file.filename`.
fn filename(name: Option<&str>) -> Result<String> {
    let name = name.filter(|name| !name.is_empty()).unwrap_or("file");
    let (got, limit) = (name.chars().count(), MAX_FILENAME_CHARS);
    if got > limit {
        return Err(Error::TooLarge { field: "file.filename".to_string(), got, limit, unit: "characters" });
    }
    Ok(name.to_string())
}

fn missing(field: &str) -> Error {
    malformed(field, "missing field")
}

fn malformed(field: &str, reason: impl Into<String>) -> Error {
    Error::Malformed { field: field.to_string(), reason: reason.into() }
}

fn invalid(field: &str, reason: impl Into<String>) -> Error {
    Error::Invalid { field: field.to_string(), reason: reason.into() }
}

/// Files, newest first unless asked otherwise.
#[utoipa::path(
    get, path = "/v1/files", tag = "OpenAI",
    params(
        ("purpose" = Option<String>, Query, description = "Only with this purpose: `batch` or `batch_output`", example = "batch"),
        ("after" = Option<String>, Query, description = "The last id of the page before"),
        ("limit" = Option<usize>, Query, description = "1 to 10000, which is the default", example = 100),
        ("order" = Option<String>, Query, description = "`desc`, the default, or `asc`", example = "desc"),
    ),
    responses((status = 200, body = FileList, description = "A page"), Refusals),
)]
pub async fn list(State(state): State<ApiState>, RawQuery(query): RawQuery) -> Result<axum::Json<FileList>, Fault> {
    let ListQuery { after, limit, order, purpose } = ListQuery::parse(query.as_deref().unwrap_or_default(), MAX_LIMIT)?;
    let purpose = match purpose.as_deref() {
        None => None,
        Some(word) => Some(Purpose::of(word).ok_or_else(|| invalid("purpose", "expected `batch` or `batch_output`"))?),
    };
    let limit = limit.unwrap_or(MAX_LIMIT);
    let query = FileQuery { purpose, after, limit, order: order.unwrap_or(Order::NewestFirst) };
    let page = state.files().list(&query).await?;
    Ok(axum::Json(FileList::from(&page)))
}

/// One file, without its content.
#[utoipa::path(
    get, path = "/v1/files/{id}", tag = "OpenAI",
    params(("id" = String, Path, description = "The `id` of a file", example = "file-019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, body = FileObject, description = "The file"), Refusals),
)]
pub async fn one(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<axum::Json<FileObject>, Fault> {
    let file = state.files().get(&id_of(path)?).await?;
    Ok(axum::Json(FileObject::from(&file)))
}

/// Deletes a file. A batch that reads it goes on; the content stays until its window is over, and nobody else finds it.
#[utoipa::path(
    delete, path = "/v1/files/{id}", tag = "OpenAI",
    params(("id" = String, Path, description = "The `id` of a file", example = "file-019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, body = DeletedFile, description = "It is gone"), Refusals),
)]
pub async fn remove(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<axum::Json<DeletedFile>, Fault> {
    let id = id_of(path)?;
    state.files().delete(&id).await?;
    Ok(axum::Json(DeletedFile { id, object: "file", deleted: true }))
}

/// The content of a file, as it was uploaded or as a batch has written it.
#[utoipa::path(
    get, path = "/v1/files/{id}/content", tag = "OpenAI",
    params(("id" = String, Path, description = "The `id` of a file", example = "file-019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, description = "JSON lines", body = String, content_type = "application/jsonl"), Refusals),
)]
pub async fn content(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, Fault> {
    let file = state.files().get(&id_of(path)?).await?;
    let mut content = state.files().content(&file);
    // The first part before the head, so that what cannot be read at all is an error and no broken answer.
    let first = content.next().await?;
    let later = stream::try_unfold(content, |mut content| async move {
        Ok::<_, Error>(content.next().await?.map(|part| (Bytes::from(part), content)))
    });
    let first = stream::iter(first.map(|part| Ok(Bytes::from(part))));
    let logged = first.chain(later).inspect(|part| {
        if let Err(error) = part {
            tracing::error!(%error, "the content of a file breaks off");
        }
    });
    let mut response = Response::new(Body::from_stream(logged));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    // What breaks off is told by the missing bytes.
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.meta.num_bytes));
    Ok(response)
}
