//! What a chunk writes: lines of the output file and of the error file.

use bytes::Bytes;
use serde_json::json;

use super::call::EndpointAnswer;
use super::state::ChunkResults;
use crate::Result;
use crate::jobs::parts::{PartWriter, Sealed};

/// What came of one request.
#[derive(Debug, Clone)]
pub enum Outcome {
    Answered(EndpointAnswer),
    Skipped(Skip),
}

/// Why a request was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    Expired,
    Cancelled,
}

impl Skip {
    /// OpenAI's code, and words for it.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Expired => {
                ("batch_expired", "the batch's completion window was over before this request was answered")
            }
            Self::Cancelled => ("batch_cancelled", "the batch was cancelled before this request was answered"),
        }
    }
}

/// Writes lines, and counts what they say.
pub struct ResultWriter {
    output: PartWriter,
    errors: PartWriter,
    results: ChunkResults,
}

impl ResultWriter {
    pub fn new(output: PartWriter, errors: PartWriter) -> Self {
        Self { output, errors, results: ChunkResults::default() }
    }

    /// Appends one line to the file it belongs to. Errors: the store's.
    pub async fn push(&mut self, request_id: &str, custom_id: &str, outcome: &Outcome) -> Result<()> {
        let results = &mut self.results;
        let line = line(request_id, custom_id, outcome);
        match outcome {
            Outcome::Answered(answer) if (200..300).contains(&answer.status) => {
                results.num_completed += 1;
                results.num_tokens += answer.num_tokens;
                if results.model.is_none() {
                    results.model = answer.model.as_deref().map(str::to_string);
                }
                return self.output.write(&line).await;
            }
            Outcome::Answered(_) => results.num_failed += 1,
            Outcome::Skipped(Skip::Expired) => results.num_expired += 1,
            Outcome::Skipped(Skip::Cancelled) => results.num_cancelled += 1,
        }
        self.errors.write(&line).await
    }

    /// All that was written, with what holds its parts. Errors: the store's.
    pub async fn finish(self) -> Result<(ChunkResults, Vec<Sealed>)> {
        let mut results = self.results;
        let (output, errors) = (self.output.seal().await?, self.errors.seal().await?);
        results.output = output.as_ref().map(|sealed| sealed.segment.clone());
        results.errors = errors.as_ref().map(|sealed| sealed.segment.clone());
        Ok((results, output.into_iter().chain(errors).collect()))
    }
}

/// A line with its end, in OpenAI's form.
fn line(request_id: &str, custom_id: &str, outcome: &Outcome) -> Vec<u8> {
    let ids = format!(r#"{{"id":{},"custom_id":{},"response":"#, json!(request_id), json!(custom_id));
    let mut line = ids.into_bytes();
    match outcome {
        Outcome::Answered(answer) => {
            let head = format!(r#"{{"status_code":{},"request_id":{},"body":"#, answer.status, json!(request_id));
            line.extend_from_slice(head.as_bytes());
            push_body(&mut line, &answer.body);
            line.extend_from_slice(br#"},"error":null}"#);
        }
        Outcome::Skipped(skip) => {
            let (code, message) = skip.words();
            let error = json!({"code": code, "message": message});
            line.extend_from_slice(format!(r#"null,"error":{error}}}"#).as_bytes());
        }
    }
    line.push(b'\n');
    line
}

/// Appends JSON as it is, but on one line: within JSON an end of line is only white space.
fn push_body(line: &mut Vec<u8>, body: &Bytes) {
    if body.is_empty() {
        return line.extend_from_slice(b"null");
    }
    let start = line.len();
    line.extend_from_slice(body);
    line[start..].iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b' ');
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::jobs::batch::call::Again;

    #[test]
    fn lines_are_those_of_the_protocol() {
        let answer = |status: u16, body: &'static str| {
            let body = Bytes::from_static(body.as_bytes());
            Outcome::Answered(EndpointAnswer { status, body, num_tokens: 1, model: None, again: Again::No })
        };
        let read = |outcome: &Outcome| -> Value {
            let line = line("batch_req_1", "a \"b\"\n", outcome);
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            serde_json::from_slice(&line).unwrap()
        };
        let ok = read(&answer(200, "{\n \"x\": [1.5]}\n"));
        let expected = json!({
            "id": "batch_req_1", "custom_id": "a \"b\"\n", "error": null,
            "response": {"status_code": 200, "request_id": "batch_req_1", "body": {"x": [1.5]}},
        });
        assert_eq!(ok, expected);
        assert_eq!(read(&answer(502, ""))["response"]["body"], Value::Null);
        let late = read(&Outcome::Skipped(Skip::Expired));
        assert_eq!((&late["response"], &late["error"]["code"]), (&Value::Null, &json!("batch_expired")));
    }
}
