//! Hidden characters. Names and log lines must not contain them: two different names would look the
//! same, or a line would look different from its content.

use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

/// Whether a character is invisible or changes the order of the text around it: control and format
/// characters (also those for writing direction), separators other than the plain space, and
/// characters that render as nothing.
///
/// ```
/// use dispatch_protocol::wire::is_hidden;
///
/// // A right-to-left override, a zero-width space, a Hangul filler, a line separator, a no-break space.
/// assert!(['\u{202e}', '\u{200b}', '\u{3164}', '\u{2028}', '\u{a0}', '\n'].into_iter().all(is_hidden));
/// assert!(!['a', 'ä', '日', 'ש', '-', '\u{301}', ' '].into_iter().any(is_hidden));
/// ```
pub fn is_hidden(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    match c.general_category() {
        GeneralCategory::Control
        | GeneralCategory::Format
        | GeneralCategory::LineSeparator
        | GeneralCategory::ParagraphSeparator
        | GeneralCategory::SpaceSeparator
        | GeneralCategory::Surrogate => true,
        _ => is_blank(c),
    }
}

/// Characters of other categories that render as nothing: the default ignorable ones of Unicode
/// (`DerivedCoreProperties`) and the blank Braille pattern.
fn is_blank(c: char) -> bool {
    matches!(
        c,
        '\u{34f}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{2065}'
            | '\u{2800}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fff8}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

#[cfg(test)]
mod tests {
    use super::is_hidden;
    use crate::wire::is_name;

    #[test]
    fn names_can_be_seen() {
        for hidden in [
            "\u{85}",
            "\u{ad}",
            "\u{34f}",
            "\u{61c}",
            "\u{115f}",
            "\u{180e}",
            "\u{200b}",
            "\u{200d}",
            "\u{200e}",
            "\u{200f}",
            "\u{202a}",
            "\u{202e}",
            "\u{2060}",
            "\u{2066}",
            "\u{2069}",
            "\u{2028}",
            "\u{2029}",
            "\u{2800}",
            "\u{3000}",
            "\u{3164}",
            "\u{fe0f}",
            "\u{feff}",
            "\u{ffa0}",
            "\u{1d173}",
            "\u{e0001}",
            "\u{e0100}",
        ] {
            assert!(hidden.chars().all(is_hidden), "{}", hidden.escape_unicode());
            assert!(!is_name(&format!("web{hidden}")), "{}", hidden.escape_unicode());
        }
        for name in ["web", "größe", "веб", "网页", "שרת", "\u{1f600}", "e\u{301}", "\"q"]
        {
            assert!(is_name(name), "{name}");
        }
    }
}
