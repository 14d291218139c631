//! Which files of a repository or a folder make a model.

/// The files to take, and which of them hold weights.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Small files first, so that a fault of theirs is seen before gigabytes came.
    pub files: Vec<String>,
    /// Empty for a folder of safetensors, where the loader looks for itself: a list of shards would only
    /// repeat the index.
    pub weights: Vec<String>,
}

/// What a loader reads beside weights, in the root or in a module's folder (`1_Pooling/`).
const BESIDE: [&str; 12] = [
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
];

/// Names of documents a licence may ask to be kept.
const DOCUMENTS: [&str; 3] = ["LICENSE", "LICENCE", "NOTICE"];

/// Picks from the names of all files (folders with `/`). `gguf` is the GGUF file asked for by name;
/// without it safetensors are preferred to GGUF, and other formats are not read.
///
/// Errors: the reason why there is no model among them.
pub fn choose(names: &[String], gguf: Option<&str>) -> Result<Chosen, String> {
    let mut small: Vec<String> = names.iter().filter(|n| is_beside(n) || is_document(n)).cloned().collect();
    small.sort();
    let weights = match gguf {
        Some(file) => vec![asked_for(names, file)?],
        None => weights(names)?,
    };
    let is_gguf = weights.iter().all(|w| has_extension(w, "gguf"));
    let has = |file: &str| small.iter().any(|n| base(n) == file);
    // A GGUF file may carry both in its metadata.
    for needed in ["config.json", "tokenizer.json"] {
        // A model of images has no tokenizer.
        let is_needed = needed != "tokenizer.json" || !has("preprocessor_config.json");
        if !is_gguf && is_needed && !has(needed) {
            return Err(format!("has no {needed}"));
        }
    }
    let dense = names.iter().filter(|n| is_gguf && is_dense(n)).cloned();
    let files = small.into_iter().chain(dense).chain(weights.iter().cloned()).collect();
    Ok(Chosen { files, weights: if is_gguf { weights } else { Vec::new() } })
}

/// The safetensors, or the only GGUF file.
fn weights(names: &[String]) -> Result<Vec<String>, String> {
    let single: Vec<String> =
        names.iter().filter(|n| is_module_file(n) && base(n) == "model.safetensors").cloned().collect();
    let folder = |n: &str| n.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.to_string());
    let is_shard = |n: &str| base(n).starts_with("model-") && has_extension(n, "safetensors");
    let is_index = |n: &str| base(n) == "model.safetensors.index.json";
    // A folder's one file goes before its shards; a Dense module has a file of its own beside an encoder's shards.
    let is_whole = |n: &str| single.iter().any(|one| folder(one) == folder(n));
    let is_part = |n: &&String| is_module_file(n) && (is_shard(n) || is_index(n)) && !is_whole(n);
    let mut shards: Vec<String> = names.iter().filter(is_part).cloned().collect();
    if shards.iter().any(|n| is_index(n)) {
        shards.sort_by_key(|n| (!is_index(n), n.clone()));
        return Ok(single.into_iter().chain(shards).collect());
    }
    if !single.iter().all(|n| is_dense(n)) {
        return Ok(single);
    }
    let mut ggufs: Vec<String> = names.iter().filter(|n| has_extension(n, "gguf")).cloned().collect();
    ggufs.sort();
    match ggufs.as_slice() {
        [one] => Ok(vec![one.clone()]),
        [] => match names
            .iter()
            .find(|n| ["bin", "pt", "onnx", "h5", "msgpack", "ot"].iter().any(|e| has_extension(n, e)))
        {
            Some(other) => Err(format!("has weights only in other formats ({other}); safetensors and GGUF are read")),
            None => Err("has no weights: neither model.safetensors nor a .gguf file".to_string()),
        },
        several => Err(format!("has several GGUF files; name one with --file: {}", several.join(", "))),
    }
}

fn asked_for(names: &[String], file: &str) -> Result<String, String> {
    if !has_extension(file, "gguf") {
        return Err(format!("`{file}` is no GGUF file"));
    }
    match names.iter().find(|n| *n == file) {
        Some(name) => Ok(name.clone()),
        None => {
            let ggufs: Vec<&str> = names.iter().filter(|n| has_extension(n, "gguf")).map(String::as_str).collect();
            let has = if ggufs.is_empty() { "no GGUF file".to_string() } else { ggufs.join(", ") };
            Err(format!("has no `{file}`; it has {has}"))
        }
    }
}

fn is_beside(name: &str) -> bool {
    is_module_file(name) && BESIDE.contains(&base(name))
}

/// The weights of a module after the pooling.
fn is_dense(name: &str) -> bool {
    is_module_file(name) && name.ends_with("_Dense/model.safetensors")
}

fn is_document(name: &str) -> bool {
    !name.contains('/') && DOCUMENTS.iter().any(|d| name == *d || name.starts_with(&format!("{d}.")))
}

/// In the root, or in a folder that sentence-transformers numbered: `onnx/config.json` is another model.
fn is_module_file(name: &str) -> bool {
    match name.split_once('/') {
        None => true,
        Some((folder, file)) => {
            let digits = folder.bytes().take_while(u8::is_ascii_digit).count();
            digits > 0 && folder[digits..].starts_with('_') && !file.contains('/')
        }
    }
}

fn base(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn has_extension(name: &str, extension: &str) -> bool {
    base(name).rsplit_once('.').is_some_and(|(_, e)| e.eq_ignore_ascii_case(extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(names: &[&str], gguf: Option<&str>) -> Result<Chosen, String> {
        choose(&names.iter().map(|n| n.to_string()).collect::<Vec<_>>(), gguf)
    }

    #[test]
    fn a_sentence_transformers_repository_gives_only_what_is_read() {
        let names = [
            ".gitattributes",
            "README.md",
            "LICENSE",
            "1_Pooling/config.json",
            "config.json",
            "data_config.json",
            "model.safetensors",
            "modules.json",
            "onnx/model.onnx",
            "onnx/config.json",
            "openvino/openvino_model.bin",
            "pytorch_model.bin",
            "sentence_bert_config.json",
            "tokenizer.json",
            "vocab.txt",
            "nested/1_X/config.json",
        ];
        let chosen = pick(&names, None).unwrap();
        let expected = [
            "1_Pooling/config.json",
            "LICENSE",
            "config.json",
            "modules.json",
            "sentence_bert_config.json",
            "tokenizer.json",
            "model.safetensors",
        ];
        assert_eq!(chosen.files, expected);
        assert!(chosen.weights.is_empty(), "the loader finds model.safetensors itself");
    }

    #[test]
    fn shards_come_with_their_index_first() {
        let names = [
            "config.json",
            "tokenizer.json",
            "model-00002-of-00002.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
        ];
        let chosen = pick(&names, None).unwrap();
        let weights = &chosen.files[2..];
        assert_eq!(
            weights,
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        );
    }

    #[test]
    fn modules_bring_their_own_weights() {
        let beside =
            ["config.json", "tokenizer.json", "modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"];
        let with = |more: &[&str]| pick(&[&beside[..], more].concat(), None);
        assert_eq!(
            with(&["model.safetensors"]).unwrap().files[4..],
            ["2_Dense/model.safetensors", "model.safetensors"]
        );
        let shards = with(&["model-00001-of-00001.safetensors", "model.safetensors.index.json"]).unwrap();
        let expected =
            ["2_Dense/model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"];
        assert_eq!(shards.files[4..], expected);
        let gguf = with(&["m.gguf"]).unwrap();
        assert_eq!(gguf.files[4..], ["2_Dense/model.safetensors", "m.gguf"]);
        assert_eq!(gguf.weights, ["m.gguf"]);
        assert!(with(&["pytorch_model.bin"]).unwrap_err().contains("only in other formats"));
    }

    #[test]
    fn gguf_files_are_taken_alone_or_by_name() {
        let chosen = pick(&["model.Q8_0.GGUF", "README.md"], None).unwrap();
        assert_eq!((chosen.files, chosen.weights), (vec!["model.Q8_0.GGUF".into()], vec!["model.Q8_0.GGUF".into()]));
        let several = pick(&["b.gguf", "a.gguf"], None).unwrap_err();
        assert_eq!(several, "has several GGUF files; name one with --file: a.gguf, b.gguf");
        let chosen = pick(&["b.gguf", "a.gguf", "model.safetensors", "tokenizer.json"], Some("b.gguf")).unwrap();
        assert_eq!(chosen.files, ["tokenizer.json", "b.gguf"]);
        assert_eq!(pick(&["b.gguf"], Some("c.gguf")).unwrap_err(), "has no `c.gguf`; it has b.gguf");
        assert_eq!(pick(&["model.bin"], Some("model.bin")).unwrap_err(), "`model.bin` is no GGUF file");
    }

    #[test]
    fn what_cannot_be_served_says_why() {
        let cases: [(&[&str], &str); 4] = [
            (&["config.json", "tokenizer.json"], "has no weights"),
            (&["config.json", "pytorch_model.bin"], "only in other formats (pytorch_model.bin)"),
            (&["model.safetensors", "config.json"], "has no tokenizer.json"),
            (&["model.safetensors", "tokenizer.json"], "has no config.json"),
        ];
        for (names, reason) in cases {
            let got = pick(names, None).unwrap_err();
            assert!(got.contains(reason), "{names:?}: {got}");
        }
    }
}
