//! What Cohere would bill: counted as its documents say, so that clients which add it up find what they are used to.

use crate::Result;
use crate::api::ApiState;
use crate::inference::Computed;
use crate::request::Input;

/// Documents that a search unit ranks.
const UNIT_DOCUMENTS: usize = 100;
/// Tokens of a chunk, the query's included; a longer document counts once a chunk.
const CHUNK_TOKENS: usize = 500;
/// Tokens of a query at most: what is beyond them is not read.
const MAX_QUERY_TOKENS: usize = 256;

/// The units of a ranking: one for a query with up to 100 documents. A document that has more than 500 tokens with the query
/// counts as its chunks, each with the query.
///
/// Source: Cohere's definition of a search unit (cohere.com/pricing) and its reranking best practices.
/// Errors: those of [`crate::serve::Engine::tokenize`]; texts are tokenised where their bytes alone do not tell.
pub async fn search_units(state: &ApiState, model: Option<&str>, query: &str, documents: &[String]) -> Result<usize> {
    // A token has a byte at least, but for one that may mark the beginning: what is short in bytes is short in tokens.
    let most_tokens = |text: &str| text.len() + 1;
    let room = CHUNK_TOKENS - most_tokens(query).min(MAX_QUERY_TOKENS);
    let most: usize = documents.iter().map(|document| num_chunks(most_tokens(document), room)).sum();
    if most.div_ceil(UNIT_DOCUMENTS) <= 1 {
        return Ok(1);
    }
    let long = documents.iter().filter(|document| most_tokens(document) > room);
    let texts: Vec<String> = [query].into_iter().chain(long.map(String::as_str)).map(str::to_string).collect();
    let num_short = documents.len() + 1 - texts.len();
    let tokens = state.engine.tokenize(model, texts, false).await?;
    let mut lens = tokens.iter().map(Vec::len);
    let room = CHUNK_TOKENS - lens.next().unwrap_or(0).min(MAX_QUERY_TOKENS);
    let num_documents = num_short + lens.map(|len| num_chunks(len, room)).sum::<usize>();
    Ok(num_documents.div_ceil(UNIT_DOCUMENTS).max(1))
}

/// `room` is at least 1: a query leaves some.
fn num_chunks(num_tokens: usize, room: usize) -> usize {
    num_tokens.div_ceil(room).max(1)
}

/// The units of embeddings: images, and the tokens of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbedUnits {
    pub num_images: usize,
    /// Special tokens included, whether they were computed or found in the cache.
    pub num_tokens: usize,
}

impl EmbedUnits {
    /// Of what was computed; `num_images` of its inputs are images, whose tokens are not those of a text.
    pub fn of(computed: &Computed, num_images: usize) -> Self {
        let of_image = computed.info.signature.values.map_or(0, |values| values.num_tokens);
        Self { num_images, num_tokens: computed.usage.num_tokens.saturating_sub(num_images * of_image) }
    }

    /// `{"input_tokens": 7}`, `{"images": 1}`, or both.
    pub fn json(self, has_texts: bool) -> String {
        let Self { num_images, num_tokens } = self;
        match (num_images, has_texts) {
            (0, _) => format!(r#"{{"input_tokens":{num_tokens}}}"#),
            (_, false) => format!(r#"{{"images":{num_images}}}"#),
            (_, true) => format!(r#"{{"images":{num_images},"input_tokens":{num_tokens}}}"#),
        }
    }
}

/// How many of these are images.
pub fn num_images(inputs: &[Input]) -> usize {
    inputs.iter().filter(|input| matches!(input, Input::Image(_))).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_document_counts_once_a_chunk() {
        for (num_tokens, chunks) in [(0, 1), (1, 1), (400, 1), (401, 2), (800, 2), (801, 3)] {
            assert_eq!(num_chunks(num_tokens, 400), chunks, "{num_tokens}");
        }
    }

    #[test]
    fn texts_and_images_are_counted_apart() {
        let units = EmbedUnits { num_images: 2, num_tokens: 9 };
        assert_eq!(units.json(true), r#"{"images":2,"input_tokens":9}"#);
        assert_eq!(units.json(false), r#"{"images":2}"#);
        assert_eq!(EmbedUnits { num_images: 0, num_tokens: 9 }.json(true), r#"{"input_tokens":9}"#);
    }
}
