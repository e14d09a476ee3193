//! Numbers in sentences.

/// `1 connection`, `2 connections`: a number and its noun.
pub(crate) fn count(number: u64, noun: &str) -> String {
    let ending = match (number, noun.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{number} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn numbers_have_the_right_noun() {
        assert_eq!(count(0, "connection"), "0 connections");
        assert_eq!(count(1, "connection"), "1 connection");
        assert_eq!(count(2, "worker"), "2 workers");
        assert_eq!(count(1, "process"), "1 process");
        assert_eq!(count(8, "process"), "8 processes");
    }
}
