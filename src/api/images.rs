//! Images inside JSON: base64, alone or as a data URL. No other URL is followed: the server asks nobody for what a client
//! names.

use base64::Engine;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::engine::{DecodePaddingMode, general_purpose};

use crate::request::Input;

/// With or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The file that a text holds. Whether it is an image is seen when it is decoded.
///
/// Errors: what is wrong with the text.
pub fn image(text: &str) -> Result<Input, String> {
    let base64 = match text.strip_prefix("data:") {
        Some(rest) => match rest.split_once(',') {
            Some((kind, data)) if kind.starts_with("image/") && kind.ends_with(";base64") => data,
            _ => return Err("expected a data URL of an image in base64".to_string()),
        },
        None if text.contains("://") => return Err("URLs are not fetched: send the image itself in base64".to_string()),
        None => text,
    };
    BASE64.decode(base64).map(|file| Input::Image(file.into())).map_err(|e| format!("expected base64: {e}"))
}

/// A file in base64, as [`image`] reads it.
pub fn to_base64(file: &[u8]) -> String {
    general_purpose::STANDARD.encode(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_and_data_urls_are_files() {
        let file = Input::Image(vec![0xff, 0xfe, 0xfd, 0xfc].into());
        for text in ["//79/A==", "//79/A", "data:image/png;base64,//79/A=="] {
            assert_eq!(image(text), Ok(file.clone()), "{text}");
        }
        for (text, says) in [
            ("https://127.0.0.1/a.png", "not fetched"),
            ("data:text/plain;base64,AAAA", "data URL"),
            ("data:image/png,AAAA", "data URL"),
            ("no base64!", "base64"),
        ] {
            assert!(image(text).unwrap_err().contains(says), "{text}");
        }
    }
}
