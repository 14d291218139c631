//! Rust source as the tidy rules see it: code without comments and literals, split into tokens and paths.
//!
//! Enough of the language for house rules, not a parser: macros are read as if they were plain code.

/// One file of the project.
pub struct Source {
    /// From the project's root, with `/`.
    pub path: String,
    /// The file as it is.
    pub text: String,
    /// The lines before the file's own tests, comments and the insides of literals blanked out; line numbers stay.
    pub code: String,
}

/// A path in code: where it stands and its segments, `crate::{a::b, c}` unfolded into `crate::a::b` and `crate::c`.
#[derive(Debug, PartialEq, Eq)]
pub struct Path {
    pub line: usize,
    pub segments: Vec<String>,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        let num_lines = lines_before_tests(text);
        let blanked = blank(text);
        let code = blanked.lines().take(num_lines).map(|line| format!("{line}\n")).collect();
        Self { path: path.to_string(), text: text.to_string(), code }
    }

    /// Lines of the file before `#[cfg(test)]` stands at the start of one.
    pub fn num_lines_before_tests(&self) -> usize {
        lines_before_tests(&self.text)
    }

    /// "serve" for `src/serve/queue.rs`, "app" for `src/app.rs`, `None` outside src/.
    pub fn room(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("src/")?;
        Some(rest.split_once('/').map_or_else(|| rest.trim_end_matches(".rs"), |(room, _)| room))
    }

    /// How many modules lie between the crate's root and this file's items: 1 for `src/app.rs` and `src/serve/mod.rs`.
    fn depth(&self) -> usize {
        let rest = self.path.strip_prefix("src/").unwrap_or(&self.path);
        if rest == "lib.rs" || rest == "main.rs" {
            0
        } else {
            rest.trim_end_matches("/mod.rs").matches('/').count() + 1
        }
    }

    /// Every path of two segments or more, and every `use name`. `super::` that leads to the root reads `crate::`.
    pub fn paths(&self) -> Vec<Path> {
        let tokens = tokens(&self.code);
        let mut found = Vec::new();
        let mut i = 0;
        while i < tokens.len() {
            let starts = is_name(&tokens[i].1) && (i == 0 || tokens[i - 1].1 != "::" || starts_global(&tokens, i));
            let goes_on = tokens.get(i + 1).is_some_and(|t| t.1 == "::");
            let used = i > 0 && tokens[i - 1].1 == "use";
            if starts && (goes_on || used) {
                i = unfold(&tokens, i, &mut Vec::new(), &mut found);
            } else {
                i += 1;
            }
        }
        for path in &mut found {
            let num_supers = path.segments.iter().take_while(|s| *s == "super").count();
            if num_supers > 0 && num_supers >= self.depth() {
                path.segments.splice(..num_supers, ["crate".to_string()]);
            }
        }
        found
    }

    /// Each name, number or punctuation mark of the code with its line, from 1.
    pub fn tokens(&self) -> Vec<(usize, String)> {
        tokens(&self.code)
    }
}

/// Whether the `::` before token i opens a global path (`::metrics::counter!`) and belongs to nothing before it.
fn starts_global(tokens: &[(usize, String)], i: usize) -> bool {
    i < 2 || !(is_name(&tokens[i - 2].1) && tokens[i - 2].1 != "use" || tokens[i - 2].1 == ">")
}

/// Reads one path from token i on, a group in braces as many; returns the token after it.
fn unfold(tokens: &[(usize, String)], mut i: usize, before: &mut Vec<String>, found: &mut Vec<Path>) -> usize {
    let line = tokens[i].0;
    let num_before = before.len();
    let text = |i: usize| tokens.get(i).map_or("", |t| t.1.as_str());
    loop {
        if is_name(text(i)) || text(i) == "*" {
            before.push(text(i).to_string());
            i += 1;
            if text(i) == "::" && (is_name(text(i + 1)) || text(i + 1) == "{" || text(i + 1) == "*") {
                i += 1;
                continue;
            }
        } else if text(i) == "{" {
            i += 1;
            while i < tokens.len() && text(i) != "}" {
                if is_name(text(i)) {
                    i = unfold(tokens, i, before, found);
                    continue;
                }
                i += 1;
            }
            before.truncate(num_before);
            return i + 1;
        }
        found.push(Path { line, segments: before.clone() });
        before.truncate(num_before);
        return i;
    }
}

fn is_name(token: &str) -> bool {
    token.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_')
}

fn tokens(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let len = if first.is_alphanumeric() || first == '_' {
                rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            found.push((number + 1, rest[..len].to_string()));
            rest = rest[len..].trim_start();
        }
    }
    found
}

fn lines_before_tests(text: &str) -> usize {
    text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count()
}

/// Comments and the insides of string and character literals as spaces, everything else as it is.
pub fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let end = literal_end(&chars, i);
        if end == i {
            out.push(chars[i]);
            i += 1;
            continue;
        }
        let is_string = chars[i] != '/';
        for (k, &c) in chars[i..end].iter().enumerate() {
            let edge = is_string && (k == 0 || k + 1 == end - i);
            out.push(if c == '\n' || edge { c } else { ' ' });
        }
        i = end;
    }
    out
}

/// The end of the comment or literal that starts at i, or i itself where none does.
fn literal_end(chars: &[char], i: usize) -> usize {
    let at = |k: usize| chars.get(k).copied().unwrap_or('\0');
    let in_name = i > 0 && (chars[i - 1].is_alphanumeric() || chars[i - 1] == '_');
    match at(i) {
        '/' if at(i + 1) == '/' => (i..chars.len()).find(|&k| chars[k] == '\n').unwrap_or(chars.len()),
        '/' if at(i + 1) == '*' => {
            let (mut depth, mut k) = (1, i + 2);
            while depth > 0 && k < chars.len() {
                match (at(k), at(k + 1)) {
                    ('/', '*') => (depth, k) = (depth + 1, k + 2),
                    ('*', '/') => (depth, k) = (depth - 1, k + 2),
                    _ => k += 1,
                }
            }
            k.min(chars.len())
        }
        'r' if !in_name && (at(i + 1) == '"' || at(i + 1) == '#') => raw_end(chars, i),
        // `br"…"` and `cr"…"`: the letter before stays, the rest is read here.
        'r' if in_name && matches!(chars[i - 1], 'b' | 'c') && (i < 2 || !chars[i - 2].is_alphanumeric()) => {
            raw_end(chars, i)
        }
        '"' => quoted_end(chars, i, '"'),
        // A character literal closes after one (escaped) character; anything else is a lifetime.
        '\'' if at(i + 1) == '\\' || (at(i + 2) == '\'' && at(i + 1) != '\'') => quoted_end(chars, i, '\''),
        _ => i,
    }
}

fn raw_end(chars: &[char], i: usize) -> usize {
    let num_hashes = chars[i + 1..].iter().take_while(|&&c| c == '#').count();
    if chars.get(i + 1 + num_hashes) != Some(&'"') {
        return i; // a raw identifier
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', num_hashes)).collect();
    let start = i + 2 + num_hashes;
    (start..chars.len()).find(|&k| chars[k..].starts_with(&close)).map_or(chars.len(), |k| k + close.len())
}

fn quoted_end(chars: &[char], i: usize, quote: char) -> usize {
    let mut k = i + 1;
    while k < chars.len() && chars[k] != quote {
        k += if chars[k] == '\\' { 2 } else { 1 };
    }
    (k + 1).min(chars.len())
}
