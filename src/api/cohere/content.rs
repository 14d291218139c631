//! The field `inputs` of `/v2/embed`: a list of items with parts of content.

use serde::Deserialize;
use utoipa::ToSchema;

use crate::api::images::image;
use crate::request::Input;
use crate::{Error, Result};

/// One thing to embed.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Item {
    /// One part: a text or an image. No model that is served makes one embedding of several.
    #[schema(min_items = 1, max_items = 1)]
    pub content: Vec<Part>,
}

/// A part of what is embedded.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    Text { text: String },
    ImageUrl { image_url: ImageUrl },
}

/// An image, for models that take them.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ImageUrl {
    /// A PNG, JPEG or WebP file as a data URL.
    pub url: String,
}

impl Item {
    /// What the engine is asked. Errors: `Empty` without a part, `Invalid` for more than one, `Malformed` for a URL without
    /// an image, each naming item `i`.
    pub fn input(self, i: usize) -> Result<Input> {
        let field = || format!("inputs[{i}].content");
        let num_parts = self.content.len();
        let mut parts = self.content.into_iter();
        match (parts.next(), num_parts) {
            (None, _) => Err(Error::Empty { field: field() }),
            (Some(Part::Text { text }), 1) => Ok(Input::Text(text)),
            (Some(Part::ImageUrl { image_url }), 1) => {
                let malformed =
                    |reason| Error::Malformed { field: format!("inputs[{i}].content[0].image_url.url"), reason };
                image(&image_url.url).map_err(malformed)
            }
            (Some(_), _) => {
                let reason =
                    format!("expected one part, got {num_parts}: no model here fuses several into one embedding");
                Err(Error::Invalid { field: field(), reason })
            }
        }
    }
}
