//! What embeddings are for, in other protocols' words, and the prompts that models have for it.

use crate::model::ModelInfo;

/// What an embedding is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Query,
    Document,
    Similarity,
    Classification,
    Clustering,
}

impl Use {
    /// The names that models give such a prompt, the first there is in a model is taken; compared without regard to case.
    ///
    /// Source: the `prompts` of published models (`config_sentence_transformers.json`): E5 and GTE say query and passage
    /// or document, Nomic search_query, Jina retrieval.query, EmbeddingGemma Retrieval-query, STS and Clustering.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Query => &["query", "search_query", "retrieval.query", "retrieval-query", "retrieval_query"],
            Self::Document => &[
                "document",
                "passage",
                "search_document",
                "retrieval.passage",
                "retrieval-document",
                "retrieval_document",
                "corpus",
            ],
            Self::Similarity => &["text-matching", "similarity", "sts"],
            Self::Classification => &["classification"],
            Self::Clustering => &["clustering", "separation"],
        }
    }

    /// The model's prompt for this; `None` where it has none, and its default prompt, if any, goes before the texts.
    pub fn prompt_name(self, info: &ModelInfo) -> Option<String> {
        let find = |name: &&str| info.prompts.keys().find(|known| known.eq_ignore_ascii_case(name)).cloned();
        self.names().iter().find_map(find)
    }
}
