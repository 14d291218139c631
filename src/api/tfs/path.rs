//! What an address below `/v1/models/` asks for: `{model}[/versions/{v}|/labels/{l}][/metadata|:predict|…]`.
//!
//! Read by hand from the end, because names of models may have slashes ("org/name") and the colon stands within a
//! segment.

/// What is asked of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    Status,
    Metadata,
    Predict,
    Classify,
    Regress,
}

impl Subject {
    /// The word of the address.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Metadata => "metadata",
            Self::Predict => "predict",
            Self::Classify => "classify",
            Self::Regress => "regress",
        }
    }
}

/// Which version of a model is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
    /// The one that is served.
    Served,
    Version(&'a str),
    Label(&'a str),
}

/// An address, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address<'a> {
    pub model: &'a str,
    pub which: Which<'a>,
    pub subject: Subject,
}

impl Address<'_> {
    /// False where a name is all there is: that is OpenAI's address too.
    pub fn is_more_than_a_name(&self) -> bool {
        (self.which, self.subject) != (Which::Served, Subject::Status)
    }
}

/// Reads what stands behind `/v1/models/`, percent-decoded. `None` without a model's name, and for a word behind a colon that is
/// no verb of the protocol.
pub fn parse(rest: &str) -> Option<Address<'_>> {
    let (rest, subject) = match (rest.strip_suffix("/metadata"), rest.rsplit_once(':')) {
        (Some(rest), _) => (rest, Subject::Metadata),
        (None, Some((rest, "predict"))) => (rest, Subject::Predict),
        (None, Some((rest, "classify"))) => (rest, Subject::Classify),
        (None, Some((rest, "regress"))) => (rest, Subject::Regress),
        (None, Some((_, verb))) if !verb.contains('/') => return None,
        (None, _) => (rest, Subject::Status),
    };
    let mut from_end = rest.rsplitn(3, '/');
    let (last, kind, before) = (from_end.next(), from_end.next(), from_end.next());
    let (model, which) = match (before, kind, last) {
        (Some(model), Some("versions"), Some(version)) if !version.is_empty() => (model, Which::Version(version)),
        (Some(model), Some("labels"), Some(label)) if !label.is_empty() => (model, Which::Label(label)),
        _ => (rest, Which::Served),
    };
    (!model.is_empty()).then_some(Address { model, which, subject })
}

/// Whether a path as it came, percent-encoded, belongs to this protocol and not to OpenAI's.
pub fn is_ours(path: &str) -> bool {
    read(path, |address| address.is_more_than_a_name()) == Some(true)
}

/// What a path as it came, percent-encoded, asks of a model; `None` for one that is not below `/v1/models/`.
pub fn subject(path: &str) -> Option<Subject> {
    read(path, |address| address.subject)
}

fn read<T>(path: &str, of: impl Fn(Address) -> T) -> Option<T> {
    let rest = path.strip_prefix("/v1/models/")?;
    if !rest.contains('%') {
        return parse(rest).map(of);
    }
    // What else may be encoded changes no name of this protocol.
    let decoded = rest.replace("%3A", ":").replace("%3a", ":").replace("%2F", "/").replace("%2f", "/");
    parse(&decoded).map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_an_address_is_read() {
        for (rest, model, which, subject) in [
            ("m", "m", Which::Served, Subject::Status),
            ("org/name", "org/name", Which::Served, Subject::Status),
            ("m/versions/2", "m", Which::Version("2"), Subject::Status),
            ("m/labels/stable", "m", Which::Label("stable"), Subject::Status),
            ("m/metadata", "m", Which::Served, Subject::Metadata),
            ("org/name/versions/2/metadata", "org/name", Which::Version("2"), Subject::Metadata),
            ("m:predict", "m", Which::Served, Subject::Predict),
            ("org/name/labels/l:predict", "org/name", Which::Label("l"), Subject::Predict),
            ("m/versions/10:classify", "m", Which::Version("10"), Subject::Classify),
            ("m:regress", "m", Which::Served, Subject::Regress),
            // A version without a model or a number is a part of the name.
            ("versions/2", "versions/2", Which::Served, Subject::Status),
            ("m/versions/", "m/versions/", Which::Served, Subject::Status),
        ] {
            assert_eq!(parse(rest), Some(Address { model, which, subject }), "{rest}");
        }
        for rest in ["", ":predict", "/metadata", "m:explain", "m/versions/2:", "/versions/1"] {
            assert_eq!(parse(rest), None, "{rest}");
        }
    }

    #[test]
    fn only_more_than_a_name_is_ours() {
        for path in
            ["/v1/models/m:predict", "/v1/models/m%3Apredict", "/v1/models/o%2Fn/metadata", "/v1/models/m/versions/1"]
        {
            assert!(is_ours(path), "{path}");
        }
        for path in
            ["/v1/models", "/v1/models/m", "/v1/models/org/name", "/v1/models/m:explain", "/v1/embeddings:predict"]
        {
            assert!(!is_ours(path), "{path}");
        }
    }
}
