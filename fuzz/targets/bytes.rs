//! Small numbers from a target's input. Past its end all numbers are 0.

pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub fn new(data: &'a [u8]) -> Bytes<'a> {
        Bytes(data)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound.max(1)
    }

    /// Numbers near the ends of every width, and all small ones.
    pub fn number(&mut self) -> u64 {
        let byte = self.byte();
        let near = |end: u64| end.wrapping_add(u64::from(byte & 7)).wrapping_sub(3);
        match byte >> 3 {
            31 => near(u64::MAX),
            30 => near(i64::MAX as u64),
            29 => near(u64::from(u32::MAX)),
            28 => near(i32::MAX as u64),
            27 => near(u64::from(u16::MAX)),
            _ => u64::from(byte),
        }
    }

    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}
